"""The families of public checkpoints: how one is told, which path and settings it was made for, what of it is left out.

The names themselves are in names.py. What a file asks for is read off the arguments stored with it, or off its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast.config import ConfigError
from cmt_fast.convert import names
from cmt_fast.convert.files import Source
from cmt_fast.convert.opcodes import shown

Weights = dict[str, Tensor]


class Asks(NamedTuple):
    """What a file says it was made for; None where it does not say. model: keys of the recipe's model, as built.

    affine: (a, b) of the latents z = a x + b that it was trained on, channel by channel or one for all.
    """

    model: dict[str, Any]
    side: int | None = None
    channels: int | None = None
    classes: int | None = None
    sigma_data: float | None = None
    affine: tuple[list[float], list[float]] | None = None
    against: tuple[str, ...] = ()


class Family(NamedTuple):
    """One project's networks. marks: names that each of its files has; unused: beginnings of names -> why they are left out."""

    name: str
    path: str | None
    marks: tuple[str, ...]
    names: Callable[[Weights], Weights]
    asks: Callable[[Source], Asks]
    unused: dict[str, str]

    def rename(self, theirs: Weights) -> tuple[Weights, dict[str, str]]:
        """Our names, and the file's names that are left out with the reason. Raises ValueError for an unknown name."""
        why = lambda name: next((text for start, text in self.unused.items() if name.startswith(start)), None)
        skipped = {name: reason for name in theirs if (reason := why(name))}
        return self.names({k: v for k, v in theirs.items() if k not in skipped}), skipped


def _arguments(source: Source) -> dict[str, Any]:
    return source.about.get("init_kwargs") or {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _numbers(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(v) is int for v in value) else None


def _unet_asks(source: Source, kind: str, conv: Tensor, defaults: dict[str, Any], **more) -> Asks:
    """EDM's and EDM2's preconditioners keep their arguments; their U-Nets name them alike."""
    given = {**defaults, **_arguments(source)}
    state = source.about.get("state") or {}
    model = {
        "kind": kind,
        "width": _whole(given.get("model_channels")) or conv.shape[0],
        "multipliers": _numbers(given.get("channel_mult")),
        "blocks": _whole(given.get("num_blocks")),
        "attention": _numbers(given.get("attn_resolutions")),
        **more,
    }
    sigma = _number(given.get("sigma_data", state.get("sigma_data")))
    side, channels, classes = (_whole(given.get(k)) for k in ("img_resolution", "img_channels", "label_dim"))
    encoder = (source.about.get("encoder") or {}).get("state") or {}
    scale, bias = encoder.get("scale"), encoder.get("bias")
    affine = (scale, bias) if isinstance(scale, list) and isinstance(bias, list) and all(scale) else None
    return Asks(model, side, channels, classes, sigma, affine)


def _first_convolution(source: Source, start: str) -> Tensor:
    found = (t for n, t in source.tensors.items() if n.startswith(start) and n.endswith("_conv.weight") and t.ndim == 4)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"FILE: {str(source.path)!r} has no first convolution {start}...")
    return first


def _edm2_asks(source: Source) -> Asks:
    conv = _first_convolution(source, "unet.enc.")
    return _unet_asks(source, "edm2", conv, {"img_channels": conv.shape[1] - 1})  # it also sees a channel of ones


def _edm_asks(source: Source) -> Asks:
    conv = _first_convolution(source, "model.enc.")
    adm = "model.out_conv.weight" in source.tensors
    defaults = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]}
    if not adm:
        defaults = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
    defaults = {**defaults, "img_channels": conv.shape[1]} if _arguments(source) else {"img_channels": conv.shape[1]}
    augment = source.tensors.get("model.map_augment.weight")
    asks = _unet_asks(source, "edm", conv, defaults, adm=adm, augment=0 if augment is None else augment.shape[1])
    kind = source.about.get("class")
    if kind not in (None, "EDMPrecond"):
        return asks._replace(against=(f"class: the file's network is a {kind}, what is built here is EDMPrecond",))
    return asks


def _own_asks(source: Source) -> Asks:
    """A file of `cmt ckpt export` holds the whole run it comes from."""
    run = (source.about.get("cmt") or {}).get("run") or {}
    return Asks(dict(run.get("model") or {}), sigma_data=_number(run.get("sigma_data")))


OURS = Family("cmt-fast", None, (), lambda theirs: dict(theirs), _own_asks, {})
FAMILIES = (
    Family("edm2", "ve", ("unet.emb_fourier.freqs", "unet.out_gain"), names.edm2, _edm2_asks, {}),
    Family("edm", "ve", ("model.map_layer0.weight",), names.edm, _edm_asks, {}),
)  # fmt: skip


def find(source: Source, own: Weights) -> Family:
    """The family of a file, told by its names. Raises ConfigError when there is none."""
    if source.about.get("cmt") or source.tensors.keys() & own.keys():
        return OURS
    for family in FAMILIES:
        if all(mark in source.tensors for mark in family.marks):
            return family
    first = shown(next(iter(source.tensors)))
    raise ConfigError(
        f"FILE: {str(source.path)!r} is of no known family (its first tensor is {first!r}); known are "
        f"{', '.join(f.name for f in FAMILIES)} and files of `cmt ckpt export`"
    )
