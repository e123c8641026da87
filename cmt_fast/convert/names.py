"""What a tensor of another project's network is called in ours, and how it is laid out here: one function a family.

Each takes the published state dict, upstream name -> tensor, and returns ours, name -> tensor: parameters and constant
buffers of the wrapped network (`models.build`), so a checkpoint's `model` and `ema-0` hold exactly these. Tensors keep
their dtype. Nothing is read from disk and nothing of the arguments is changed. A name that a family does not have, and a
tensor that is missing, raise ValueError.
"""

from __future__ import annotations

import re

from torch import Tensor

Weights = dict[str, Tensor]


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
    """EDM's `EDMPrecond` over DDPM++ or ADM (NVlabs/edm): `model: {kind: edm, preset: ...}` on path ve.

    All tensors as they are; the resampling filters, which are constants here, are checked and left out. NCSN++ is refused.
    """
    block = {"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2", "norm2": "norm3"}
    block |= {x: x for x in ("affine", "skip", "qkv", "proj")}
    kept = {}
    for name, tensor in theirs.items():
        if not name.endswith(".resample_filter"):
            kept[name] = tensor
        elif tensor.shape[-1] != 2:
            raise ValueError(
                f"{name!r}: a resampling filter of {tensor.shape[-1]} taps is NCSN++'s, which is not built"
            )
    return _renamed(
        kept,
        [
            (r"model\.map_layer([01])\.(\w+)", lambda m: f"net.layer{int(m[1]) + 1}.{m[2]}"),
            (r"model\.map_(label|augment)\.(\w+)", lambda m: f"net.{m[1]}.{m[2]}"),
            (r"model\.enc\.\d+x\d+_conv\.(\w+)", lambda m: f"net.conv.{m[1]}"),
            (r"model\.(?:dec\.\d+x\d+_aux|out)_norm\.(\w+)", lambda m: f"net.out_norm.{m[1]}"),
            (r"model\.(?:dec\.\d+x\d+_aux|out)_conv\.(\w+)", lambda m: f"net.out.{m[1]}"),
            (
                rf"model\.(enc|dec)\.(\d+x\d+_(?:block\d+|down|up|in\d))\.({'|'.join(block)})\.(weight|bias)",
                lambda m: f"net.{m[1]}oder.{m[2]}.{block[m[3]]}.{m[4]}",
            ),
        ],
    )


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
