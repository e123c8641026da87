"""EDM2's U-Net as CMT-Fast trains it, for inference in plain torch (Karras et al. 2024, configuration G).

F(x, t, r, labels) is the raw network: `pipeline.py` beside it scales its input and reads its output. Convolutions and
attention are computed in the dtype of the weights; times and labels are embedded in float32. The weights lie in the file
as they multiply: of unit length, which in training each forward makes anew.
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


def walk(x: Tensor, emb: Tensor, encoder: nn.ModuleDict, decoder: nn.ModuleDict, join) -> Tensor:
    """Through all blocks; the encoder remembers what each gave, and join(x, skip) gives it back to the decoder, last first."""
    skips = [x]
    for block in encoder.values():
        x = block(x, emb)
        skips.append(x)
    for name, block in decoder.items():
        x = block(join(x, skips.pop()) if "block" in name else x, emb)
    return x


def resample(x: Tensor, how: str) -> Tensor:
    """(B, C, H, W): "keep", "halve" by means of 2 x 2 pixels, "double" by repeating pixels."""
    if how == "halve":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "double" else x


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


BALANCE = 0.3  # share of the residual branch, and of attention, in a magnitude-preserving sum
EPS = 1e-4


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """((1 - share) a + share b) over the length of the shares: the magnitude of a and b."""
    total = math.hypot(1 - share, share)
    return torch.add(a * ((1 - share) / total), b, alpha=share / total)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """a and b side by side along the channels, each with an equal part in the magnitude."""
    n_a, n_b = a.shape[1], b.shape[1]
    both = math.sqrt((n_a + n_b) / 2)
    return torch.cat((a * (both / math.sqrt(n_a)), b * (both / math.sqrt(n_b))), dim=1)


def pixel_norm(x: Tensor, dim: int) -> Tensor:
    """x of mean square 1 along a dimension; its length is taken in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return x / (length * x.shape[dim] ** -0.5 + EPS).to(x.dtype)


class MPLayer(nn.Module):
    """y = W x, no bias: a linear layer (kernel 0) or a convolution."""

    def __init__(self, d_in: int, d_out: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((d_out, d_in, kernel, kernel) if kernel else (d_out, d_in)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.ndim == 2:
            return F.linear(x, w)
        return F.conv2d(x, w.contiguous(memory_format=torch.channels_last), padding=w.shape[-1] // 2)


class ExactMPLayer(InFloat32, MPLayer):
    """The same in float32."""


class MPLabel(ExactMPLayer):
    """labels: (B,) in [0, classes] -> (B, width); the null class `classes`, or a label that is dropped, gives 0."""

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        table = F.pad(self.weight.t() * math.sqrt(self.weight.shape[1]), (0, 0, 0, 1))
        if drop is not None:
            labels = labels.masked_fill(drop, len(table) - 1)
        return F.embedding(labels, table)


class MPFourier(InFloat32):
    """t: (B,) -> (B, n): sqrt(2) cos(frequency t + phase), drawn once in training and kept."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.zeros(n))
        self.register_buffer("phase", torch.zeros(n))

    def forward(self, t: Tensor) -> Tensor:
        return fourier(t, self.frequency, self.phase)


class Edm2Block(nn.Module):
    """x: (B, C, H, W), emb: (B, D) -> (B, C', H', W'): a residual branch, then attention."""

    def __init__(self, place: Place, encodes: bool, emb: int, head: int) -> None:
        super().__init__()
        c_in, c = place.inputs, place.outputs
        self.resample, self.encodes = place.resample, encodes
        self.heads = c // head if place.attention else 0
        self.gain = nn.Parameter(torch.zeros([]))
        self.emb = MPLayer(emb, c)
        self.conv1, self.conv2 = MPLayer(c if encodes else c_in, c, 3), MPLayer(c, c, 3)
        self.skip = MPLayer(c_in, c, 1) if c_in != c else None
        self.qkv = MPLayer(c, 3 * c, 1) if self.heads else None
        self.proj = MPLayer(c, c, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample)
        if self.encodes:
            x = pixel_norm(x if self.skip is None else self.skip(x), 1)
        y = self.conv1(mp_silu(x))
        y = self.conv2(mp_silu(y * ((self.emb(emb) * self.gain)[:, :, None, None] + 1)))
        if not self.encodes and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, BALANCE)
        if self.heads:
            qkv = pixel_norm(pack_heads(self.qkv(x), self.heads), -1)
            x = mp_sum(x, self.proj(attention(qkv, x.shape[2])), BALANCE)
        return x.clamp(-256, 256)


class CmtEdm2(Network):
    """EDM2's U-Net (Karras et al. 2024): x (B, C, H, W), t, r (B,), labels (B,) -> (B, C, H, W).

    two_times adds features of t - r. classes 0: labels are not read.
    """

    @register_to_config
    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        width: int,
        multipliers: list[int],
        blocks: int,
        attention: list[int],
        head: int,
        two_times: bool = False,
    ) -> None:
        """Many parameters: the hyperparameters as they are published."""
        super().__init__()
        widths = [width * m for m in multipliers]
        encoder, decoder = plan(side, widths[0], widths, blocks, attention, sparse=False)
        self.classes, emb = classes, max(widths)
        self.fourier, self.noise = MPFourier(widths[0]), ExactMPLayer(widths[0], emb)
        self.duration = ExactMPLayer(widths[0], emb) if two_times else None
        self.label = MPLabel(classes, emb) if classes else None
        self.conv = MPLayer(channels + 1, widths[0], 3)
        self.encoder, self.decoder = (
            nn.ModuleDict({p.name: Edm2Block(p, encodes, emb, head) for p in places})
            for places, encodes in ((encoder, True), (decoder, False))
        )
        self.out, self.out_gain = MPLayer(widths[0], channels, 3), nn.Parameter(torch.zeros([]))

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        emb = self._embed(t, r, labels, drop).to(self.dtype)
        x = x.to(self.dtype)
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)  # the channel of ones stands in for biases
        x = x.contiguous(memory_format=torch.channels_last)  # what fast convolutions take, and the trainer's bits
        return self.out(walk(self.conv(x), emb, self.encoder, self.decoder, mp_cat)) * self.out_gain

    def _embed(self, t: Tensor, r: Tensor | None, labels: Tensor | None, drop: Tensor | None) -> Tensor:
        """(B, D) float32."""
        emb = self.noise(self.fourier(t))
        if self.duration is not None:
            emb = mp_sum(emb, self.duration(self.fourier(t - (t if r is None else r))))
        if self.label is not None:
            null = torch.full_like(t, self.classes, dtype=torch.int64)
            emb = mp_sum(emb, self.label(null if labels is None else labels, drop))
        return mp_silu(emb)
