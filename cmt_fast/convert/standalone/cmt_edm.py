"""EDM's U-Nets as CMT-Fast trains them, for inference in plain torch: DDPM++, NCSN++ and ADM (Karras et al. 2022).

F(x, t, r, labels) is the raw network: `pipeline.py` beside it scales its input and reads its output. Convolutions and
attention are computed in the dtype of the weights; times and labels are embedded in float32.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

TAPS = (1, 3, 3, 1)  # of NCSN++'s filters


class InFloat32(nn.Module):
    """A module whose numbers stay in float32 when its network is moved to another dtype, and that autocast leaves alone."""

    def _apply(self, fn, recurse=True):
        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep, recurse)

    def __call__(self, x: Tensor, *rest):
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return super().__call__(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return super().__call__(x, *rest)


class Network(ModelMixin, ConfigMixin):
    """What the networks of all files share: how they are loaded, and the dtype that they compute in."""

    code = Path(__file__).read_text("utf-8")  # what save_pretrained writes; the file may be another folder's by then

    @classmethod
    def from_pretrained(cls, *arguments, **named):
        """As of every ModelMixin, but read in float32 and then moved as a whole: constants are neither left empty nor rounded."""
        dtype = named.pop("dtype", None) or named.pop("torch_dtype", None)
        device = named.pop("device_map", None)
        if isinstance(device, dict):
            device = device.get("")
        if device in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise ValueError(f"device_map: {device!r} splits a network; this one goes to one device, such as 'cuda'")
        named["low_cpu_mem_usage"] = False
        found = super().from_pretrained(*arguments, **named)
        net = found[0] if isinstance(found, tuple) else found
        nn.Module.to(net.requires_grad_(False).eval(), device, dtype if isinstance(dtype, torch.dtype) else None)
        return found

    def save_config(self, save_directory: str | Path, *rest, **named) -> None:
        """As of every ModelMixin; also writes this code, and leaves out the folder that the weights came from."""
        super().save_config(save_directory, *rest, **named)
        folder, name = Path(save_directory), type(self).__module__.rpartition(".")[2]
        config = json.loads((folder / self.config_name).read_text("utf-8"))
        config.pop("_name_or_path", None)
        (folder / self.config_name).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / f"{name}.py").write_text(self.code, "utf-8")

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype


class Place(NamedTuple):
    """One block: its name, channels in and out, what it does to the side ("keep", "halve", "double"), attention."""

    name: str
    inputs: int
    outputs: int
    resample: str = "keep"
    attention: bool = False


def plan(side: int, first: int, widths: list, blocks: int, attended: list, sparse: bool) -> tuple[list, list]:
    """Places of the encoder, after its first convolution to `first` channels, and of the decoder; a width for each level.

    attended: the sides whose blocks have attention; sparse: in the decoder only the last one of a level.
    """
    encoder, decoder, width, skips = [], [], first, [first]
    for level, outputs in enumerate(widths):
        here = side >> level
        if level:
            encoder.append(Place(f"{here}x{here}_down", width, width, "halve"))
            skips.append(width)
        for i in range(blocks):
            encoder.append(Place(f"{here}x{here}_block{i}", width, outputs, attention=here in attended))
            width = outputs
            skips.append(width)
    for level, outputs in reversed(list(enumerate(widths))):
        here = side >> level
        if level == len(widths) - 1:
            decoder.append(Place(f"{here}x{here}_in0", width, width, attention=True))
            decoder.append(Place(f"{here}x{here}_in1", width, width))
        else:
            decoder.append(Place(f"{here}x{here}_up", width, width, "double"))
        for i in range(blocks + 1):
            attends = here in attended and (i == blocks or not sparse)
            decoder.append(Place(f"{here}x{here}_block{i}", width + skips.pop(), outputs, attention=attends))
            width = outputs
    return encoder, decoder


def walk(x: Tensor, emb: Tensor, encoder: nn.ModuleDict, decoder: nn.ModuleDict, join, after) -> Tensor:
    """Through all blocks; the encoder remembers what each gave, and join(x, skip) gives it back to the decoder, last first.

    after(name, x): what becomes of what the encoder's block of this name gave.
    """
    skips = [x]
    for name, block in encoder.items():
        x = after(name, block(x, emb))
        skips.append(x)
    for name, block in decoder.items():
        x = block(join(x, skips.pop()) if "block" in name else x, emb)
    return x


def resample(x: Tensor, how: str, taps: tuple = (1, 1)) -> Tensor:
    """(B, C, H, W): "keep", "halve" by means of 2 x 2 pixels, "double" by repeating pixels; or both by an even filter's taps."""
    if len(taps) > 2 and how != "keep":
        pad, f = len(taps) // 2 - 1, weights_of(x, taps)
        if how == "halve":
            return F.conv2d(x, f, stride=2, padding=pad, groups=x.shape[1])
        return F.conv_transpose2d(x, 4 * f, stride=2, padding=pad, groups=x.shape[1])
    if how == "halve":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "double" else x


def weights_of(x: Tensor, taps: tuple) -> Tensor:
    """A filter's taps along both sides, their sum 1, for each channel of x: (C, 1, n, n)."""
    f = torch.stack([x.new_full((), k) for k in taps])
    return (f[:, None] * f / sum(taps) ** 2).expand(x.shape[1], 1, -1, -1)


def pack_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, 3 C, H, W), channels in the order head, width, (q, k, v) -> (B, H W, 3, heads, C / heads)."""
    return qkv.flatten(2).unflatten(1, (heads, -1, 3)).permute(0, 4, 3, 1, 2).contiguous()


def attention(qkv: Tensor, side: int) -> Tensor:
    """(B, T, 3, heads, d) -> (B, heads d, side, T / side): softmax(q k^T / sqrt(d)) v."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if qkv.is_cpu and not torch.compiler.is_compiling() and _extreme(qkv):
        o = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v)
    return o.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (side, -1))


def _extreme(qkv: Tensor) -> bool:
    """Whether logits pass 4096 or values 1e30: the trainer leaves torch's fused kernel there, and so do its bits."""
    q, k, v = (float(x.abs().max()) for x in qkv.unbind(2))
    return not (q * k * qkv.shape[-1] ** 0.5 <= 4096 and v <= 1e30)


def fourier(t: Tensor, frequency: Tensor, phase: Tensor | None = None) -> Tensor:
    """t: (B,) -> cosines and sines (B, 2 n) float32 of t frequency; with a phase sqrt(2) cos(t frequency + phase), (B, n)."""
    exact = torch.float32 if t.device.type == "mps" else torch.float64
    angle = t.to(exact)[:, None] * frequency.to(t.device, exact)
    if phase is None:
        return torch.cat((angle.cos(), angle.sin()), dim=-1).float()
    return ((angle + phase.to(t.device, exact)).cos() * math.sqrt(2)).float()


class ExactLinear(InFloat32, nn.Linear):
    """A linear layer in float32."""


class TimeEmbedder(InFloat32):
    """t: (B,) -> (B, width): 64 cosines and sines of t, frequencies from 1/4 to 32, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        exact = torch.float32 if t.device.type == "mps" else torch.float64
        w = torch.logspace(math.log(0.25), math.log(32.0), 32, base=math.e, dtype=exact, device=t.device)
        return self.out(F.silu(self.hidden(fourier(t, w))))


class LabelLayer(InFloat32):
    """labels: (B,) in [0, classes] -> (B, D): a column of a weight times sqrt(classes) and a bias, or (ADM) the column alone.

    The null class `classes`, and a label that is dropped, is the bias alone.
    """

    def __init__(self, classes: int, width: int, adm: bool) -> None:
        super().__init__()
        self.scale = 1.0 if adm else math.sqrt(classes)
        self.weight = nn.Parameter(torch.zeros(width, classes))
        self.bias = None if adm else nn.Parameter(torch.zeros(width))

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        table = F.pad(self.weight.t() * self.scale, (0, 0, 0, 1))
        if drop is not None:
            labels = labels.masked_fill(drop, len(table) - 1)
        y = F.embedding(labels, table)
        return y if self.bias is None else y + self.bias


class GroupNorm(nn.Module):
    """x: (B, C, H, W) -> mean 0 and variance 1 in groups of at least 4 channels, at most 32 groups; taken in float32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.group_norm(x.to(wide).contiguous(), self.groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


def conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class EdmBlock(nn.Module):
    """x: (B, C, H, W), emb: (B, D) -> (B, C', H', W'): a residual branch, then attention."""

    def __init__(self, place: Place, emb: int, adm: bool, taps: tuple) -> None:
        super().__init__()
        self.taps = taps
        c_in, c, eps = place.inputs, place.outputs, 1e-5 if adm else 1e-6
        self.resample, self.adm, self.scale = place.resample, adm, 1.0 if adm else math.sqrt(0.5)
        self.heads = (c // 64 if adm else 1) if place.attention else 0
        projects = c_in != c or (not adm and place.resample != "keep")
        self.norm1, self.norm2 = GroupNorm(c_in, eps), GroupNorm(c, eps)
        self.conv1, self.conv2 = conv(c_in, c, 3), conv(c, c, 3)
        self.affine = nn.Linear(emb, 2 * c if adm else c)
        self.skip = conv(c_in, c, 1) if projects else None
        self.norm3 = GroupNorm(c, eps) if self.heads else None
        self.qkv = conv(c, 3 * c, 1) if self.heads else None
        self.proj = conv(c, c, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(resample(F.silu(self.norm1(x)), self.resample, self.taps))
        params = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = params.chunk(2, dim=1)
            y = self.norm2(y) * (scale + 1) + shift
        else:
            y = self.norm2(y + params)
        x = resample(x, self.resample, self.taps)
        x = self._sum(self.conv2(F.silu(y)), x if self.skip is None else self.skip(x))
        if self.heads:
            qkv = pack_heads(self.qkv(self.norm3(x)), self.heads)
            x = self._sum(self.proj(attention(qkv, x.shape[2])), x)
        return x

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.scale == 1 else (a + b) * self.scale


class Waves(InFloat32):
    """t: (B,) -> (B, 2 n): cosines and sines of NCSN++'s random frequencies, in turns."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.zeros(n))

    def forward(self, t: Tensor) -> Tensor:
        return fourier(t, 2 * math.pi * self.frequency)


class Pyramid(nn.Module):
    """image: (B, C, H, W) -> (B, E, H/2, W/2): convolved over two pixels more than it has, then filtered and halved."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv(c_in, c_out, 3)

    def forward(self, image: Tensor) -> Tensor:
        wide = self.conv(F.pad(image, (1, 1, 1, 1)))
        return F.conv2d(wide, weights_of(wide, TAPS), stride=2, groups=wide.shape[1])


class CmtEdm(Network):
    """EDM's U-Nets (Karras et al. 2022), DDPM++, NCSN++ or ADM: x (B, C, H, W), t, r (B,), labels (B,) -> (B, C, H, W).

    two_times adds an embedding of t - r. classes 0: labels are not read.
    """

    @register_to_config
    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        adm: bool,
        width: int,
        multipliers: list[int],
        blocks: int,
        attention: list[int],
        two_times: bool = False,
        ncsnpp: bool = False,
    ) -> None:
        """Many parameters: the hyperparameters as they are published."""
        super().__init__()
        widths = [width * m for m in multipliers]
        first, emb, eps = widths[0] if adm else width, 4 * width, 1e-5 if adm else 1e-6
        encoder, decoder = plan(side, first, widths, blocks, attention, sparse=not adm)
        waves = 2 * width if ncsnpp else width
        self.adm, self.classes, self.waves = adm, classes, waves
        self.noise = Waves(width) if ncsnpp else None
        self.layer1, self.layer2 = ExactLinear(waves, emb), ExactLinear(emb, emb)
        self.duration = TimeEmbedder(emb) if two_times else None
        self.label = LabelLayer(classes, emb if adm else waves, adm) if classes else None
        self.conv = conv(channels, first, 3)
        taps = TAPS if ncsnpp else (1, 1)
        self.encoder, self.decoder = (
            nn.ModuleDict({p.name: EdmBlock(p, emb, adm, taps) for p in places}) for places in (encoder, decoder)
        )
        down = [p for p in encoder if p.resample == "halve"] if ncsnpp else []
        seen = [channels, *(p.outputs for p in down)]
        self.pyramid = nn.ModuleDict({p.name: Pyramid(c, p.outputs) for p, c in zip(down, seen)}) if down else None
        self.out_norm, self.out = GroupNorm(widths[0], eps), conv(widths[0], channels, 3)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        emb = self._embed(t, r, labels, drop).to(self.dtype)
        image = x.to(self.dtype)
        y = self.conv(image)

        def after(name: str, y: Tensor) -> Tensor:
            nonlocal image
            if self.pyramid is not None and name in self.pyramid:
                y = image = (y + self.pyramid[name](image)) * math.sqrt(0.5)
            return y

        y = walk(y, emb, self.encoder, self.decoder, lambda a, skip: torch.cat((a, skip), dim=1), after)
        return self.out(F.silu(self.out_norm(y)))

    def _embed(self, t: Tensor, r: Tensor | None, labels: Tensor | None, drop: Tensor | None) -> Tensor:
        """(B, D) float32. DDPM++ reads its waves as sines, cosines and its labels beside them."""
        label = None
        if self.label is not None:
            null = torch.full_like(t, self.classes, dtype=torch.int64)
            label = self.label(null if labels is None else labels, drop)
        half = self.waves // 2
        if self.noise is not None:
            emb = self.noise(t)
        else:
            steps = torch.arange(half, dtype=torch.float32, device="cpu") / (half - (0 if self.adm else 1))
            emb = fourier(t, ((1 / 10000) ** steps).to(t.device))
        if not self.adm:
            emb = emb.roll(half, dims=1)
            emb = emb if label is None else emb + label
        emb = self.layer2(F.silu(self.layer1(emb)))
        if self.adm and label is not None:
            emb = emb + label
        if self.duration is not None:
            emb = emb + self.duration(t - (t if r is None else r))
        return F.silu(emb)
