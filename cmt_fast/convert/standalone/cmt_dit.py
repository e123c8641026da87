"""The networks of tokens that CMT-Fast trains, for inference in plain torch: the diffusion transformer and the residual MLP.

F(x, t, r, labels) is the raw network: `pipeline.py` beside it scales its input and reads its output. Products, attention and
the residual branches are computed in the dtype of the weights; times, labels and the residual stream stay in float32.
"""

import json
import math
from pathlib import Path

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


class Constants(InFloat32):
    """Tensors that are computed, not learned."""

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def on(self, name: str, device: torch.device) -> Tensor | None:
        tensor = getattr(self, name)
        return None if tensor is None else tensor.to(device)


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
        return self.embed.weight.dtype


class TimeEmbedder(InFloat32):
    """t: (B,) -> (B, width): cosines and sines of t, then two layers.

    kind "dit": the 256 features of DiT, SiT and their kin, frequencies from 1 down to 1/10000; "gaussian": 512, their random
    frequencies are kept with the weights; "cmt": 64, from 1/4 to 32.
    """

    def __init__(self, width: int, kind: str = "cmt") -> None:
        super().__init__()
        features, frequency = {"dit": 256, "gaussian": 512, "cmt": 64}[kind], None
        if kind != "cmt":
            frequency = torch.exp(-math.log(1e4) * (torch.arange(features // 2, dtype=torch.float32) / (features // 2)))
        self.register_buffer("frequency", frequency, persistent=kind == "gaussian")
        self.hidden, self.out = nn.Linear(features, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        exact = torch.float32 if t.device.type == "mps" else torch.float64
        if self.frequency is None:
            w = torch.logspace(math.log(0.25), math.log(32.0), 32, base=math.e, dtype=exact, device=t.device)
        else:
            w = self.frequency.to(t.device, exact)
        angle = t.to(exact)[:, None] * w
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1).float()
        return self.out(F.silu(self.hidden(waves)))


class LabelEmbedder(InFloat32):
    """labels: (B,) in [0, classes] -> (B, width); row `classes` is the null class; drop: (B,) bool takes it."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(classes + 1, width))

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        if drop is not None:
            labels = labels.masked_fill(drop, len(self.table) - 1)
        return F.embedding(labels, self.table)


class GuidanceEmbedder(nn.Module):
    """guide: (B, 3), scale omega >= 1 and interval [low, high] of times -> (B, width): the difference to none, (1, 0, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.omega, self.low, self.high = (TimeEmbedder(width) for _ in range(3))

    def forward(self, guide: Tensor) -> Tensor:
        omega, low, high = guide.unbind(1)
        zero, one = torch.zeros_like(low), torch.ones_like(high)
        told = self.omega(1 - 1 / omega) + self.low(low) + self.high(high)
        return told - (self.omega(zero) + self.low(zero) + self.high(one))


class Norm(nn.Module):
    """x: (B, T, D) normalised over D, then shifted and scaled by (B, D) or (B, T, D) each; in the dtype of shift.

    Mean 0 and variance 1, or mean square 1 and a weight where `rms`.
    """

    def __init__(self, width: int, rms: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if rms else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        dtype, wide = shift.dtype, torch.promote_types(x.dtype, shift.dtype)
        x, shift, scale = x.to(wide), tokens(shift.to(wide)), scale.to(wide)
        if self.weight is None:
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        else:
            exact = x.to(torch.promote_types(wide, torch.float32))
            normed = (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(wide)
            normed = normed * self.weight.to(wide)
        return torch.addcmul(shift, normed, tokens(1 + scale)).to(dtype)


def tokens(c: Tensor) -> Tensor:
    """(B, D) -> (B, 1, D), the same for all tokens; (B, T, D) as it is."""
    return c if c.ndim == 3 else c.unsqueeze(1)


def gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.gelu(F.linear(x, layer.weight) + layer.bias, approximate="tanh")


def gated_residual(x: Tensor, branch: Tensor, layer: nn.Linear, gate: Tensor) -> Tensor:
    """x + gate layer(branch), (B, T, D), in the dtype of x; gate: (B, D) or (B, T, D)."""
    y = F.linear(branch, layer.weight).to(x.dtype) + layer.bias.to(x.dtype)
    return torch.addcmul(x, tokens(gate.to(x.dtype)), y)


def attention(qkv: Tensor) -> Tensor:
    """(B, T, 3, H, d) -> (B, T, H d): softmax(q k^T / sqrt(d)) v."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if qkv.is_cpu and not torch.compiler.is_compiling() and _extreme(qkv):
        o = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v)
    return o.transpose(1, 2).flatten(2)


def _extreme(qkv: Tensor) -> bool:
    """Whether logits pass 4096 or values 1e30: the trainer leaves torch's fused kernel there, and so do its bits."""
    q, k, v = (float(x.abs().max()) for x in qkv.unbind(2))
    return not (q * k * qkv.shape[-1] ** 0.5 <= 4096 and v <= 1e30)


class Block(nn.Module):
    """x: (B, T, D), c: (B, D) or (B, T, D) -> (B, T, D): attention, then a feed-forward branch, both modulated by c."""

    def __init__(self, width: int, heads: int, qk_norm: bool, gated: bool, rms: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        hidden = 8 * width // 3 if gated else 4 * width
        self.norm1, self.norm2 = Norm(width, rms), Norm(width, rms)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden if gated else hidden), nn.Linear(hidden, width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) if qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x, shift_a, scale_a)).unflatten(-1, (3, self.heads, -1))
        x = gated_residual(x, attention(self._turned(qkv, cos, sin)), self.proj, gate_a)
        h = self.norm2(x, shift_m, scale_m)
        if self.gated:
            a, b = self.fc1(h).chunk(2, dim=-1)
            h = F.silu(a) * b
        else:
            h = gelu(h, self.fc1)
        return gated_residual(x, h, self.fc2, gate_m)

    def _turned(self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Queries and keys of mean square 1 times a weight, and rotated by their positions, where the network does so."""
        if self.q_weight is None and cos is None:
            return qkv
        qk, v = qkv[:, :, :2], qkv[:, :, 2:]
        if self.q_weight is not None:
            weight = torch.stack((self.q_weight, self.k_weight))[:, None]
            qk = qk * torch.rsqrt(qk.float().square().mean(-1, keepdim=True) + 1e-6).to(qk.dtype) * weight.to(qk.dtype)
        if cos is not None and sin is not None:
            cos, sin = (f[:, None, None].to(qk.dtype) for f in (cos, sin))
            a, b = qk.chunk(2, dim=-1)
            qk = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((qk, v), dim=2)


class CmtDiT(Network):
    """The diffusion transformer (Peebles & Xie 2023): x (B, C, H, W), t, r (B,), labels (B,) -> (B, C, H, W).

    two_times adds an embedding of t - r. embeddings "dit": times and positions as in the published DiT and SiT, "gaussian": of
    RAE's networks. wide_head: width, depth and heads of DiT^DH's (Zheng et al. 2025), each of whose tokens is modulated by one.
    guided: it may be told a guidance scale and interval of times, guide (B, 3).
    """

    @register_to_config
    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int = 2,
        two_times: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        mlp: str = "gelu",
        norm: str = "layer",
        embeddings: str = "cmt",
        wide_head: list[int] | None = None,
        guided: bool = False,
    ) -> None:
        """Many parameters: the hyperparameters as they are published."""
        super().__init__()
        rms, gated = norm == "rms", mlp == "swiglu"
        self.patch, self.cells, self.channels = patch, side // patch, channels
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = TimeEmbedder(width, embeddings)
        self.duration = TimeEmbedder(width, embeddings) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm, gated, rms) for _ in range(depth))
        last, depth_h, heads_h = wide_head or (width, 0, heads)
        self.head_embed = nn.Linear(channels * patch**2, last) if wide_head else None
        self.head_condition = nn.Linear(width, last) if wide_head and last != width else None
        self.head_blocks = nn.ModuleList(Block(last, heads_h, qk_norm, gated, rms) for _ in range(depth_h))
        self.final_norm = Norm(last, rms)
        self.final_modulation = nn.Linear(last, 2 * last)
        self.final = nn.Linear(last, channels * patch**2)
        cos, sin = rotary(self.cells, width // heads) if rope else (None, None)
        head_cos, head_sin = rotary(self.cells, last // heads_h) if rope and wide_head else (None, None)
        place = positions(self.cells, width, embeddings != "cmt")
        self.constants = Constants(position=place, cos=cos, sin=sin, head_cos=head_cos, head_sin=head_sin)
        self.guidance = GuidanceEmbedder(width) if guided else None

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        patches = self._patchify(x.to(self.dtype))
        h = self.embed(patches) + self.constants.on("position", x.device)
        e = self.time(t)
        if self.duration is not None:
            e = e + self.duration(t - (t if r is None else r))
        c = e if self.label is None else e + self.label(labels, drop)
        c = F.silu(c if self.guidance is None or guide is None else c + self.guidance(guide))
        c = (c if self.head_embed is None else F.silu(c)).to(self.dtype)
        cos, sin = self.constants.on("cos", x.device), self.constants.on("sin", x.device)
        for block in self.blocks:
            h = block(h, c, cos, sin)
        if self.head_embed is not None:
            c = F.silu(e.unsqueeze(1) + h).to(self.dtype)
            c = F.silu(c if self.head_condition is None else self.head_condition(c))
            h = self.head_embed(patches).float() if h.dtype == torch.float32 else self.head_embed(patches)
            cos, sin = self.constants.on("head_cos", x.device), self.constants.on("head_sin", x.device)
            for block in self.head_blocks:
                h = block(h, c, cos, sin)
        h = self.final_norm(h, *self.final_modulation(c).chunk(2, dim=-1))
        return self._unpatchify(self.final(h))

    def _patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, C p p)."""
        b, c, n, p = x.shape[0], self.channels, self.cells, self.patch
        return x.reshape(b, c, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, c * p * p)

    def _unpatchify(self, y: Tensor) -> Tensor:
        """(B, T, C p p) -> (B, C, H, W)."""
        b, c, n, p = y.shape[0], self.channels, self.cells, self.patch
        return y.reshape(b, n, n, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, n * p, n * p)


def angles(cells: int, dim: int) -> Tensor:
    """Positions 0 .. cells - 1 times frequencies that fall geometrically from 1 towards 1/10000: (cells, dim) float64."""
    place = torch.arange(cells, dtype=torch.float64, device="cpu")
    return place[:, None] * 10000.0 ** -(torch.arange(dim, dtype=torch.float64, device="cpu") / dim)


def positions(cells: int, width: int, columns_first: bool) -> Tensor:
    """Fixed positions of a square grid, (cells^2, width): half the width for rows, half for columns, sines before cosines."""
    angle = angles(cells, width // 4)
    one = torch.cat((angle.sin(), angle.cos()), dim=-1)
    rows, columns = one[:, None].expand(-1, cells, -1), one[None].expand(cells, -1, -1)
    both = (columns, rows) if columns_first else (rows, columns)
    return torch.cat(both, dim=-1).reshape(cells * cells, -1).float()


def rotary(cells: int, head: int) -> tuple[Tensor, Tensor]:
    """Rotary angles of a square grid: cos, sin (cells^2, head / 2)."""
    angle = angles(cells, head // 4)
    both = torch.cat((angle[:, None].expand(-1, cells, -1), angle[None].expand(cells, -1, -1)), dim=-1)
    both = both.reshape(cells * cells, -1)
    return both.cos().float(), both.sin().float()


class CmtMlp(Network):
    """A residual MLP for vectors: x (B, D), t, r (B,), labels (B,) -> (B, D)."""

    @register_to_config
    def __init__(
        self, dim: int, classes: int, width: int, depth: int, two_times: bool = False, guided: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.time = TimeEmbedder(width)
        self.duration = TimeEmbedder(width) if two_times else None
        self.label = LabelEmbedder(classes, width) if classes else None
        self.norm = Norm(width)
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.fc1 = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.fc2 = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.final = nn.Linear(width, dim)
        self.guidance = GuidanceEmbedder(width) if guided else None

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, labels: Tensor | None = None, drop: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        h = self.embed(x.to(self.dtype)).unsqueeze(1)
        c = self.time(t)
        if self.duration is not None:
            c = c + self.duration(t - (t if r is None else r))
        if self.label is not None:
            c = c + self.label(labels, drop)
        if self.guidance is not None and guide is not None:
            c = c + self.guidance(guide)
        c = F.silu(c).to(self.dtype)
        for modulation, fc1, fc2 in zip(self.modulations, self.fc1, self.fc2):
            shift, scale, gate = modulation(c).chunk(3, dim=-1)
            h = gated_residual(h, gelu(self.norm(h, shift, scale), fc1), fc2, gate)
        return self.final(h.squeeze(1))
