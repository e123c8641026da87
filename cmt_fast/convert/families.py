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
from cmt_fast.models import edm2
from cmt_fast.schema import Run
from cmt_fast.workspace import Workspace

Weights = dict[str, Tensor]
SD_SCALE = 0.18215  # of Stable Diffusion's autoencoder, which DiT, SiT and REPA are trained behind


class Asks(NamedTuple):
    """What a file says it was made for; None where it does not say. model: keys of the recipe's model."""

    model: dict[str, Any]
    side: int | None = None
    channels: int | None = None
    classes: int | None = None
    sigma_data: float | None = None


class Family(NamedTuple):
    """One project's networks. marks: names that each of its files has; unused: beginnings of names -> why they are left out."""

    name: str
    path: str | None
    marks: tuple[str, ...]
    names: Callable[[Weights], Weights]
    asks: Callable[[Source], Asks]
    unused: dict[str, str]
    latents: tuple[float, float] | None = None  # z = a x + b of the autoencoder's x, where the files do not say it

    def rename(self, theirs: Weights) -> tuple[Weights, dict[str, str]]:
        """Our names, and the file's names that are left out with the reason. Raises ValueError for an unknown name."""
        why = lambda name: next((text for start, text in self.unused.items() if name.startswith(start)), None)
        skipped = {name: reason for name in theirs if (reason := why(name))}
        return self.names({k: v for k, v in theirs.items() if k not in skipped}), skipped


def _edm2_asks(source: Source) -> Asks:
    """EDM2's `Precond` says all in its arguments; without them, as in safetensors, the first convolution says its width."""
    given = source.about.get("init_kwargs") or {}
    state = source.about.get("state") or {}
    conv = next(
        t for name, t in source.tensors.items() if name.startswith("unet.enc.") and name.endswith("_conv.weight")
    )
    model: dict[str, Any] = {"kind": "edm2", "width": int(given.get("model_channels", conv.shape[0]))}
    for ours, theirs in {
        "multipliers": "channel_mult",
        "blocks": "num_blocks",
        "attention": "attn_resolutions",
    }.items():
        if theirs in given:
            model[ours] = tuple(given[theirs]) if isinstance(given[theirs], list) else given[theirs]
    sigma = given.get("sigma_data", state.get("sigma_data"))
    return Asks(
        model, given.get("img_resolution"), int(conv.shape[1]) - 1, given.get("label_dim"), _number(sigma)
    )  # the first convolution also sees a channel of ones


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _own_asks(source: Source) -> Asks:
    """A file of `cmt ckpt export` holds the whole run it comes from."""
    run = (source.about.get("cmt") or {}).get("run") or {}
    return Asks(dict(run.get("model") or {}), sigma_data=_number(run.get("sigma_data")))


OURS = Family("cmt-fast", None, (), lambda theirs: dict(theirs), _own_asks, {})
FAMILIES = (
    Family("edm2", "ve", ("unet.emb_fourier.freqs", "unet.out_gain"), names.edm2, _edm2_asks, {}),
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


def conflicts(source: Source, family: Family, work: Workspace) -> list[str]:
    """What the file says it was made for and the recipe does otherwise, though every shape may fit."""
    asks, run, out = family.asks(source), work.run, []
    path = (source.about.get("cmt") or {}).get("run", {}).get("path") if family is OURS else family.path
    if path and path != run.path:
        out.append(f"path: the file's network is for {path!r}, the recipe's path is {run.path!r}")
    if asks.sigma_data is not None and run.path == "ve" and abs(asks.sigma_data - run.sigma_data) > 1e-6:
        out.append(
            f"sigma_data: the file's network was trained with {asks.sigma_data:g}, the recipe has {run.sigma_data:g}"
        )
    shape, classes = work.data.shape, work.data.classes
    if asks.side is not None and len(shape) == 3 and (asks.channels, asks.side) != (shape[0], shape[1]):
        out.append(f"data: the file's network is for {asks.channels} x {asks.side} x {asks.side}, the data are {shape}")
    if asks.classes is not None and asks.classes != classes:
        out.append(f"data: the file's network knows {asks.classes} classes, the data have {classes}")
    return out


def suggestions(source: Source, family: Family, work: Workspace) -> list[str]:
    """The overrides that would bring the recipe's model and sigma_data to what the file was built with."""
    asks, run = family.asks(source), work.run
    have = {k: v for k in vars(run.model) if (v := getattr(run.model, k)) is not None}
    if isinstance(size := have.get("size"), str):
        have["width"] = have.get("width") or _width(run, size)
    out = []
    for key, value in asks.model.items():
        wanted = tuple(value) if isinstance(value, list) else value
        if wanted is not None and have.get(key) != wanted:
            out.append(f"model.{key}={list(wanted) if isinstance(wanted, tuple) else wanted}".replace(" ", ""))
    published = {width: size for size, (width, _) in edm2.SIZES.items()}
    if asks.model.get("kind") == "edm2" and asks.model["width"] in published:
        out = [f"model.size={published[asks.model['width']]}" if o.startswith("model.width=") else o for o in out]
    if asks.sigma_data is not None and run.path == "ve" and asks.sigma_data != run.sigma_data:
        out.append(f"sigma_data={asks.sigma_data:g}")
    return out


def _width(run: Run, size: str) -> int | None:
    from cmt_fast.models import dit

    sizes: dict[str, tuple] = edm2.SIZES if run.model.kind == "edm2" else dit.SIZES
    return sizes[size][0] if size in sizes else None


def normalisation(source: Source, family: Family, data: Any) -> list[str]:
    """Whether the data's latents are scaled as those that the file's network was trained on: one sentence, or none.

    Both are z = a x + b, channel by channel, of the autoencoder's own latents x.
    """
    wanted = _encoder(source.about.get("encoder")) or (family.latents and ([family.latents[0]], [family.latents[1]]))
    ours = getattr(data, "normalisation", None)
    if not wanted:
        return []
    a, b = ([float(x) for x in part] for part in wanted)
    mean, std = [-y / x for x, y in zip(a, b)], [0.5 / x for x in a]
    numbers = lambda values: "[" + ",".join(f"{v:.6g}" for v in values) + "]"
    if ours is None:
        return [
            f"the network takes latents z = a x + b with a {numbers(a)}, b {numbers(b)}; the data do not say theirs"
        ]
    scale, shift = [ours.scale / s for s in ours.std], [-m * ours.scale / s for m, s in zip(ours.mean, ours.std)]
    a, b = (part * len(scale) if len(part) == 1 else part for part in (a, b))
    near = len(a) == len(scale) and all(abs(x - y) <= 1e-3 * max(1, abs(x)) for x, y in zip(a + b, scale + shift))
    if near:
        return [f"the data's latents are scaled as the network's were: a {numbers(scale)}, b {numbers(shift)}"]
    return [
        f"WARNING: the network was trained on latents z = a x + b with a {numbers(a)}, b {numbers(b)}, the data have "
        f"a {numbers(scale)}, b {numbers(shift)}; set data.mean={numbers(mean)} data.std={numbers(std)} data.scale=0.5"
    ]


def _encoder(about: dict[str, Any] | None) -> tuple[list, list] | None:
    """scale and bias of EDM2's StabilityVAEEncoder."""
    state = (about or {}).get("state") or {}
    scale, bias = state.get("scale"), state.get("bias")
    return (scale, bias) if isinstance(scale, list) and isinstance(bias, list) and all(scale) else None
