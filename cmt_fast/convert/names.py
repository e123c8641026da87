"""What a tensor of another project's network is called in ours, and how it is laid out here: one function a family.

Each takes the published state dict, upstream name -> tensor, and returns ours, name -> tensor: parameters and constant
buffers of the wrapped network (`models.build`), so a checkpoint's `model` and `ema-0` hold exactly these. Tensors keep
their dtype. Nothing is read from disk and nothing of the arguments is changed. A name that a family does not have, and a
tensor that is missing, raise ValueError. Tensors on the meta device give names and shapes; their numbers are not checked.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from cmt_fast.models.dit import positions

Weights = dict[str, Tensor]
NCSNPP = (1, 3, 3, 1)  # the taps of its resampling filters


def edm2(theirs: Weights) -> Weights:
    """EDM2's `Precond` (NVlabs/edm2): `model: {kind: edm2, size: ...}` on path ve; all tensors as they are.

    Weights of an EMA are stored as averaged, shorter than unit length: that is how they are to be used.
    """
    block = {"emb_linear": "emb", "conv_res0": "conv1", "conv_res1": "conv2", "conv_skip": "skip"}
    block |= {"attn_qkv": "qkv", "attn_proj": "proj"}
    return _renamed(
        theirs,
        [
            (r"unet\.emb_fourier\.(freqs|phases)", lambda m: f"net.fourier.{_WAVE[m[1]]}"),
            (r"logvar_fourier\.(freqs|phases)", lambda m: f"net.log_variance.fourier.{_WAVE[m[1]]}"),
            (r"logvar_linear\.weight", lambda m: "net.log_variance.out.weight"),
            (r"unet\.emb_(noise|label)\.weight", lambda m: f"net.{m[1]}.weight"),
            (r"unet\.enc\.\d+x\d+_conv\.weight", lambda m: "net.conv.weight"),
            (r"unet\.out_(conv\.weight|gain)", lambda m: "net.out_gain" if m[1] == "gain" else "net.out.weight"),
            (r"unet\.(enc|dec)\.(\w+)\.emb_gain", lambda m: f"net.{m[1]}oder.{m[2]}.gain"),
            (
                rf"unet\.(enc|dec)\.(\w+)\.({'|'.join(block)})\.weight",
                lambda m: f"net.{m[1]}oder.{m[2]}.{block[m[3]]}.weight",
            ),
        ],
    )


def edm(theirs: Weights) -> Weights:
    """EDM's `EDMPrecond` over DDPM++, NCSN++ or ADM (NVlabs/edm): `model: {kind: edm, preset: ...}` on path ve.

    All tensors as they are; the resampling filters, which are constants here, are checked and left out: two equal taps, NCSN++'s
    1, 3, 3, 1.
    """
    block = {"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2", "norm2": "norm3"}
    block |= {x: x for x in ("affine", "skip", "qkv", "proj")}
    taps = NCSNPP if any(".map_noise." in name for name in theirs) else (1, 1)
    kept = {}
    for name, tensor in theirs.items():
        if not name.endswith(".resample_filter"):
            kept[name] = tensor
        elif not _is_filter(tensor, taps):
            text = ", ".join(map(str, taps))
            raise ValueError(f"{name!r}: is not the resampling filter of its family, {text} along both sides")
    return _renamed(
        kept,
        [
            (r"model\.map_layer([01])\.(\w+)", lambda m: f"net.layer{int(m[1]) + 1}.{m[2]}"),
            (r"model\.map_(label|augment)\.(\w+)", lambda m: f"net.{m[1]}.{m[2]}"),
            (r"model\.map_noise\.freqs", lambda m: "net.frequency"),
            (
                r"model\.enc\.(\d+x\d+)_aux_residual\.(weight|bias)",
                lambda m: f"net.pyramid.{m[1]}_down.conv.{m[2]}",
            ),
            (r"model\.enc\.\d+x\d+_conv\.(\w+)", lambda m: f"net.conv.{m[1]}"),
            (r"model\.(?:dec\.\d+x\d+_aux|out)_norm\.(\w+)", lambda m: f"net.out_norm.{m[1]}"),
            (r"model\.(?:dec\.\d+x\d+_aux|out)_conv\.(\w+)", lambda m: f"net.out.{m[1]}"),
            (
                rf"model\.(enc|dec)\.(\d+x\d+_(?:block\d+|down|up|in\d))\.({'|'.join(block)})\.(weight|bias)",
                lambda m: f"net.{m[1]}oder.{m[2]}.{block[m[3]]}.{m[4]}",
            ),
        ],
    )


def _is_filter(tensor: Tensor, taps: tuple[int, ...]) -> bool:
    """Whether a filter (1, 1, n, n) is these taps along both sides, to the rounding of half precision."""
    f = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    if tensor.shape != (1, 1, len(taps), len(taps)):
        return False
    return tensor.is_meta or torch.allclose(tensor[0, 0].double().cpu(), f[:, None] * f, rtol=1e-3, atol=0)


def dit(theirs: Weights) -> Weights:
    """DiT (facebookresearch/DiT): `model: {kind: dit, size: ..., patch: ..., embeddings: dit, precondition: ddpm}`, path ve.

    The channels of the learned variance, which no ODE reads, are left out.
    """
    return _transformer(theirs)


def sit(theirs: Weights) -> Weights:
    """SiT (willisma/SiT): `model: {kind: dit, size: ..., patch: ..., embeddings: dit}` on path linear.

    Its time runs from noise to data and its velocity with it. Both are turned round in the weights: waves of 1 - t are a
    rotation of waves of t, which the first layer of the time embedding takes in, and the last layer changes its sign. The
    embedding of t - r starts at 0, so that u(z, r, t) is the velocity at t, whatever r. The learned variance is left out.
    """
    return _one_time(_transformer(reversed_time(theirs)))


def repa(theirs: Weights) -> Weights:
    """REPA's SiT (sihyun-yu/REPA), whose time is ours, as `sit`. The projectors, which only its training reads, go.

    Its first files call the blocks behind the projectors `decoder_blocks` and count them anew.
    """
    first = len({name.split(".")[1] for name in theirs if name.startswith("blocks.")})
    count = lambda m: f"blocks.{int(m[1]) + first}."
    kept = {
        re.sub(r"^decoder_blocks\.(\d+)\.", count, k): v for k, v in theirs.items() if not k.startswith("projectors.")
    }
    return _one_time(_transformer(kept))


def meanflow(theirs: Weights) -> Weights:
    """MeanFlow's SiT of two times (zhuyu-cs/MeanFlow): model and path as for `sit`; times are ours."""
    return _transformer(theirs)


def lightningdit(theirs: Weights) -> Weights:
    """LightningDiT (hustvl/LightningDiT): `model: {kind: dit, size: ..., patch: ..., embeddings: dit, mlp: swiglu, norm: rms,
    rope: true}` on path linear, times and duration as in `sit`.

    It turns neighbours in a head, ours turns halves: queries, keys and their norms change their order inside each head.
    """
    theirs = dict(theirs)
    waves = theirs.pop("feat_rope.freqs_cos", None)
    theirs.pop("feat_rope.freqs_sin", None)
    theirs = {name: _halves(re.sub(r"^blocks\.\d+\.", "", name), x, waves) for name, x in theirs.items()}
    return _one_time(_transformer(reversed_time(theirs)))


def ditdh(theirs: Weights) -> Weights:
    """DiT^DH (bytetriper/RAE `DiTwDDTHead`, and sony/mf-rae's of two times): `model: {kind: dit, size: ..., patch: 1, embeddings:
    gaussian, mlp: swiglu, norm: rms, rope: true, wide_head: {...}}` on path linear. Times are ours.

    A network of one time becomes one of two as SiT's does. Waves are cosines before sines here, their frequencies in radians,
    and queries and keys turn halves, as `lightningdit`.
    """
    theirs = {k: v for k, v in theirs.items() if not k.endswith("feat_rope.freqs_sin")}
    waves = {part: theirs.pop(f"{part}_feat_rope.freqs_cos", None) for part in ("enc", "dec")}
    own, patches = theirs.pop("s_embedder.proj.weight", None), theirs.pop("x_embedder.proj.weight", None)
    if own is None or patches is None:
        raise ValueError("'s_embedder.proj.weight' or 'x_embedder.proj.weight' is missing: this is no DiT^DH")
    if own.shape[2:] != (1, 1) or patches.shape[2:] != (1, 1):
        raise ValueError(
            f"'x_embedder.proj.weight' is {tuple(patches.shape)}: the published networks have patches of 1"
        )
    position = theirs.pop("pos_embed", None)
    if position is not None and not position.is_meta:
        _check_position(position, len(own))
    depth, _ = wide_depths(theirs, len(own))
    turned = {
        "x_embedder.proj.bias": theirs.pop("s_embedder.proj.bias"),
        "head.proj.bias": theirs.pop("x_embedder.proj.bias"),
    }
    for name, x in theirs.items():
        if m := re.match(r"blocks\.(\d+)\.(.*)", name):
            first = int(m[1]) < depth
            name = f"blocks.{m[1]}.{m[2]}" if first else f"head_blocks.{int(m[1]) - depth}.{m[2]}"
            x = _halves(m[2], x, waves["enc" if first else "dec"])
        elif m := re.fullmatch(r"([tr]_embedder)\.(W|mlp\.0\.weight)", name):
            x = 2 * math.pi * x if m[2] == "W" else torch.cat(x.chunk(2, 1)[::-1], 1)
        turned[name] = x
    ours = _common({"x_embedder.proj.weight": own.flatten(1), "head.proj.weight": patches.flatten(1), **turned})
    return ours if "net.duration.out.weight" in ours else _one_time(ours)


def wide_depths(theirs: Weights, width: int) -> tuple[int, int]:
    """How many blocks are the transformer's, `width` wide, and how many the wide head's; two of those where both are as wide."""
    first = {int(m[1]): x for n, x in theirs.items() if (m := re.fullmatch(r"blocks\.(\d+)\.attn\.proj\.bias", n))}
    own = sum(len(x) == width for x in first.values())
    return (own, len(first) - own) if own < len(first) else (max(0, own - 2), min(own, 2))


def _halves(name: str, x: Tensor, waves: Tensor | None) -> Tensor:
    """Queries, keys and their norms of a block that turns neighbours in a head, for one that turns halves. waves: (T, head)."""
    if waves is None or not re.match(r"attn\.(qkv|[qk]_norm)\.", name):
        return x
    head = waves.shape[-1]
    halves = torch.cat((torch.arange(0, head, 2), torch.arange(1, head, 2)))
    if not name.startswith("attn.qkv."):
        return x[halves]
    qkv = x.unflatten(0, (3, -1, head))
    return torch.cat((qkv[:2, :, halves], qkv[2:])).flatten(0, 2)


def _transformer(theirs: Weights) -> Weights:
    """Patches, heads and final rows of DiT and its kin, whose names they share."""
    theirs = dict(theirs)
    position, patches = theirs.pop("pos_embed", None), theirs.get("x_embedder.proj.weight")
    if patches is None:
        raise ValueError("'x_embedder.proj.weight' is missing: this is no DiT")
    width, channels, patch = patches.shape[:3]
    if position is not None and not position.is_meta:
        _check_position(position, width)
    theirs["x_embedder.proj.weight"] = patches.flatten(1)
    for end in ("weight", "bias"):
        rows = theirs[f"final_layer.linear.{end}"].unflatten(0, (patch, patch, -1))[:, :, :channels]
        theirs[f"final_layer.linear.{end}"] = rows.movedim(2, 0).flatten(0, 2)
    return _common(theirs)


def _common(theirs: Weights) -> Weights:
    """The names that DiT and all its kin share."""
    layer = {"attn.qkv": "qkv", "attn.proj": "proj", "adaLN_modulation.1": "modulation"}
    layer |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2", "mlp.w12": "fc1", "mlp.w3": "fc2", "norm1": "norm1", "norm2": "norm2"}
    final = {"linear": "final", "adaLN_modulation.1": "final_modulation", "norm_final": "final_norm"}
    time, part = {"t": "time", "r": "duration"}, {"0": "hidden", "2": "out"}
    return _renamed(
        theirs,
        [
            (r"x_embedder\.proj\.(\w+)", lambda m: f"net.embed.{m[1]}"),
            (r"head\.proj\.(\w+)", lambda m: f"net.head_embed.{m[1]}"),
            (r"s_projector\.(\w+)", lambda m: f"net.head_condition.{m[1]}"),
            (r"([tr])_embedder\.W", lambda m: f"net.{time[m[1]]}.frequency"),
            (r"([tr])_embedder\.mlp\.([02])\.(\w+)", lambda m: f"net.{time[m[1]]}.{part[m[2]]}.{m[3]}"),
            (r"y_embedder\.embedding_table\.weight", lambda m: "net.label.table"),
            (r"((?:head_)?blocks\.\d+)\.attn\.([qk])_norm\.weight", lambda m: f"net.{m[1]}.{m[2]}_weight"),
            (
                rf"((?:head_)?blocks\.\d+)\.({'|'.join(map(re.escape, layer))})\.(weight|bias)",
                lambda m: f"net.{m[1]}.{layer[m[2]]}.{m[3]}",
            ),
            (
                rf"final_layer\.({'|'.join(map(re.escape, final))})\.(weight|bias)",
                lambda m: f"net.{final[m[1]]}.{m[2]}",
            ),
        ],
    )


def _check_position(position: Tensor, width: int) -> None:
    """Raises ValueError unless position (1, T, D) is DiT's constant, to 1e-4 and the rounding of half precision.

    A file that was halved, even if it was widened again, has numbers that float16 or bfloat16 holds exactly: they may be off
    by half a unit in the last place of that format.
    """
    given = position[0].float().cpu()
    held = [kind for kind in (torch.float16, torch.bfloat16) if torch.equal(given.to(kind).float(), given)]
    rounding = max((torch.finfo(kind).eps / 2 for kind in held), default=0.0)
    side = math.isqrt(len(given))
    ours = positions(side, width, columns_first=True)
    if given.shape != ours.shape or not torch.allclose(given, ours, rtol=rounding, atol=1e-4):
        raise ValueError("'pos_embed' is not the fixed position embedding of DiT")


def reversed_time(theirs: Weights) -> Weights:
    """The network at time 1 - t with its output negated, as weights of a network at time t.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt, sin(w (1 - t)) = sin w cos wt - cos w sin wt; in float64.
    """
    theirs = dict(theirs)
    for end in ("weight", "bias"):
        theirs[f"final_layer.linear.{end}"] = -theirs[f"final_layer.linear.{end}"]
    w = theirs["t_embedder.mlp.0.weight"]
    n = w.shape[1] // 2
    frequency = torch.exp(-math.log(1e4) * torch.arange(n, dtype=torch.float32) / n).double().to(w.device)
    (a, b), cos, sin = w.double().split(n, dim=1), frequency.cos(), frequency.sin()
    theirs["t_embedder.mlp.0.weight"] = torch.cat((a * cos + b * sin, a * sin - b * cos), dim=1).to(w.dtype)
    return theirs


def _one_time(ours: Weights) -> Weights:
    """A network of one time as one of two: its embedding of t - r is the time's, with a last layer of zeros."""
    for part in ("hidden.weight", "hidden.bias", "out.weight", "out.bias", "frequency"):
        x = ours.get(f"net.time.{part}")
        if x is None:  # waves that are no part of the weights
            continue
        ours[f"net.duration.{part}"] = torch.zeros_like(x) if part.startswith("out") else x.clone()
    return ours


_WAVE = {"freqs": "frequency", "phases": "phase"}


def _renamed(theirs: Weights, table: list) -> Weights:
    """Every tensor under the name that the first fitting row (pattern, match -> name) of the table gives."""
    ours = {}
    for name, tensor in theirs.items():
        found = next(((m, to) for pattern, to in table if (m := re.fullmatch(pattern, name))), None)
        if found is None:
            raise ValueError(f"{name!r} is no tensor of this family")
        ours[found[1](found[0])] = tensor
    return ours
