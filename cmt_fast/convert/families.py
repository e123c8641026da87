"""The families of public checkpoints: how one is told, which path and settings it was made for, what of it is left out.

The names themselves are in names.py. What a file asks for is read off the arguments stored with it, or off its shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp, Model
from cmt_fast.convert import names
from cmt_fast.convert.files import Source
from cmt_fast.models import dit, edm, edm2
from cmt_fast.safe_pickle.opcodes import shown

Weights = dict[str, Tensor]
KINDS: dict[str, Any] = {"dit": Dit, "edm2": Edm2, "edm": Edm, "mlp": Mlp}


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
    notes: tuple[str, ...] = ()


class Family(NamedTuple):
    """One project's networks. marks: patterns of names that each of its files has; left: of names that its map leaves out."""

    name: str
    path: str | None
    marks: tuple[str, ...]
    names: Callable[[Weights], Weights]
    asks: Callable[[Source], Asks]
    left: dict[str, str]

    def rename(self, theirs: Weights) -> tuple[Weights, dict[str, str]]:
        """Our names, and the file's names that are left out with the reason. Raises ValueError for what does not belong."""
        why = lambda name: next((text for pattern, text in self.left.items() if re.fullmatch(pattern, name)), None)
        try:
            ours = self.names(theirs)
        except (KeyError, IndexError, RuntimeError, AttributeError) as error:  # a map met a shape it does not know
            text = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(f"its tensors are not that family's ({type(error).__name__}: {text})") from None
        return ours, {name: reason for name in theirs if (reason := why(name))}


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
    return Asks(model, side, channels, classes, sigma, _affine((source.about.get("encoder") or {}).get("state") or {}))


def _affine(encoder: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """scale and bias of EDM2's StabilityVAEEncoder, if they are that."""
    scale, bias = encoder.get("scale"), encoder.get("bias")
    if not (isinstance(scale, list) and isinstance(bias, list) and len(scale) == len(bias)):
        return None
    return (scale, bias) if all(isinstance(x, float) for x in scale + bias) and all(scale) else None


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
    """A file of `cmt ckpt export` holds the whole run it comes from. Raises ConfigError when that is not one."""
    run = (source.about.get("cmt") or {}).get("run")
    if run is None:
        return Asks({})
    try:
        model, sigma = TypeAdapter(Model).validate_python(run["model"]), _number(run["sigma_data"])
    except (ValidationError, KeyError, TypeError):
        raise ConfigError(f"FILE: {str(source.path)!r}: the run in its metadata is not of this version") from None
    unread = ("size", "preset", "dropout", "checkpoint_activations")  # said by other keys, or no matter for the weights
    return Asks({k: v for k, v in built(model).items() if k not in unread}, sigma_data=sigma)


def built(model: Any) -> dict[str, Any]:
    """The numbers that a recipe's model is built with: its preset's, or those given."""
    given = {k: v for k, v in vars(model).items() if v is not None and not k.startswith("_")}
    if isinstance(model, Edm2):
        return {"width": edm2.SIZES[model.size][0], **given}
    if isinstance(model, Edm):
        return {**edm.PRESETS[model.preset], **given}
    if isinstance(model, Dit):
        return {**dict(zip(("width", "depth", "heads"), dit.SIZES[model.size])), **given}
    return given


def _transformer_asks(source: Source, **more) -> Asks:
    """DiT and its kin keep no arguments; their shapes say everything but the number of heads, which the size does."""
    tensors, given = source.tensors, source.about.get("args") or {}
    patches, table = tensors["x_embedder.proj.weight"], tensors.get("y_embedder.embedding_table.weight")
    if patches.ndim != 4:
        raise ConfigError(f"FILE: {str(source.path)!r}: x_embedder.proj.weight is {tuple(patches.shape)}, not 4-D")
    width, channels, patch = patches.shape[:3]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    model: dict[str, Any] = {"kind": "dit", "embeddings": "dit", "patch": patch, "width": width, "depth": depth}
    model["heads"] = next((h for w, d, h in dit.SIZES.values() if (w, d) == (width, depth)), None)
    model["qk_norm"] = "blocks.0.attn.q_norm.weight" in tensors
    position = tensors.get("pos_embed")
    side = math.isqrt(position.shape[1]) * patch if position is not None and position.ndim == 3 else None
    against = [
        f"{key}: the file's network was trained with {key} {shown(given[key])!r}, what is read here is {only}"
        for key, only in (("prediction", "velocity"), ("path_type", "Linear"))
        if key in given and str(given[key]).lower() not in (only.lower(), "v")
    ]
    classes = None if table is None else table.shape[0] - 1
    return Asks({**model, **more}, side, channels, classes, None, SD, tuple(against))


def _dit_asks(source: Source) -> Asks:
    asks = _transformer_asks(source, mlp="gelu", norm="layer", rope=False, precondition="ddpm")
    return asks._replace(notes=("it predicts the noise of DDPM's 1000 steps; of a learned variance nothing is kept",))


def _sit_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)._replace(notes=(TURNED, STARTS))


def _repa_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)._replace(notes=(STARTS,))


def _meanflow_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)


def _lightningdit_asks(source: Source) -> Asks:
    asks = _transformer_asks(source, mlp="swiglu", norm="rms", rope="feat_rope.freqs_cos" in source.tensors or None)
    latents = (
        "it was trained on VA-VAE's latents, (x - mean) / std by a file of statistics that is not in it; set data.mean,"
    )
    return asks._replace(affine=None, notes=(TURNED, STARTS, f"{latents} data.std and data.scale=1 to those"))


SD = ([0.18215], [0.0])  # DiT, SiT, REPA and MeanFlow are trained behind Stable Diffusion's autoencoder, scaled so
TURNED = "its time runs from noise to data; time and velocity are turned round in the weights, so t = 1 is noise here"
STARTS = "it knows one time; the embedding of t - r that average velocities need starts at zero"
POSITION = {"pos_embed": "a constant of the architecture, checked", r"feat_rope\..*": "a constant of the architecture"}
PROJECTORS = {r"projectors\..*": "read by its training alone"}
OURS = Family("cmt-fast", None, (), lambda theirs: dict(theirs), _own_asks, {})
PATCHES = r"x_embedder\.proj\.weight"
# the first whose marks a file has; sit and dit have the same names, their paths tell them apart
FAMILIES = (
    Family("edm2", "ve", (r"unet\.emb_fourier\.freqs", r"unet\.out_gain"), names.edm2, _edm2_asks, {}),
    Family("edm", "ve", (r"model\.map_layer0\.weight",), names.edm, _edm_asks,
           {r".*\.resample_filter": "a constant of the architecture, checked"}),
    Family("lightningdit", "linear", (PATCHES, r"blocks\.0\.mlp\.w12\.weight"), names.lightningdit, _lightningdit_asks, POSITION),
    Family("meanflow", "linear", (PATCHES, r"r_embedder\..*"), names.meanflow, _meanflow_asks, POSITION),
    Family("repa", "linear", (PATCHES, r"projectors\..*"), names.repa, _repa_asks, POSITION | PROJECTORS),
    Family("sit", "linear", (PATCHES,), names.sit, _sit_asks, POSITION),
    Family("dit", "ve", (PATCHES,), names.dit, _dit_asks, POSITION),
)  # fmt: skip


def find(source: Source, own: Weights, path: str, wanted: str | None = None) -> Family:
    """The family of a file: the one wanted, or told by its names, and where they are two families' by the recipe's path.

    Raises ConfigError when there is none.
    """
    known = {f.name: f for f in (*FAMILIES, OURS)}
    if wanted is not None and wanted not in known:
        raise ConfigError(f"--family: {wanted!r} is not valid; valid are {', '.join(known)}{nearest(wanted, known)}")
    if wanted == OURS.name or (wanted is None and (source.about.get("cmt") or source.tensors.keys() & own.keys())):
        return OURS
    has = lambda mark: any(re.fullmatch(mark, name) for name in source.tensors)
    fitting = [f for f in FAMILIES if all(map(has, f.marks)) and wanted in (None, f.name)]
    # what marks alone tell apart comes first; of equals the one of the recipe's path
    fitting.sort(key=lambda f: (-len(f.marks), f.path != path))
    if fitting:
        return fitting[0]
    first = shown(next(iter(source.tensors)))
    what = f"has not the names of {wanted}" if wanted else "is of no known family"
    raise ConfigError(
        f"FILE: {str(source.path)!r} {what} (its first tensor is {first!r}); known are {', '.join(known)}"
    )
