"""What a checkpoint was made for against what a recipe does: conflicts, overrides that would fit, how latents are scaled."""

from __future__ import annotations

from typing import Any

from cmt_fast.config.schema import Run
from cmt_fast.convert.families import KINDS, Asks, Family, built
from cmt_fast.convert.files import Source
from cmt_fast.data import classes as in_data
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.rows import Rows
from cmt_fast.models import dit, edm, edm2
from cmt_fast.run.absent import AbsentRows

MANY = 16  # channels from which on one number stands for all of them


def conflicts(source: Source, family: Family, asks: Asks, run: Run, data: Rows) -> list[str]:
    """What the file says it was made for and the recipe does otherwise, though every shape may fit."""
    out = list(asks.against)
    have = {"adm": None, "ncsnpp": None, **built(run.model)}
    for key, value in _wanted(asks).items():
        if not _same(have.get(key), value) and (
            run.model.kind == asks.model.get("kind", run.model.kind) or key == "kind"
        ):
            key = f"preset ({key})" if key in ("adm", "ncsnpp") else key
            out.append(
                f"model.{key}: the file's network has {_yaml(value)}, the recipe's {_yaml(have.get(key.split()[0]))}"
            )
    stored = (source.about.get("cmt") or {}).get("run") or {}
    path = family.path or stored.get("path")
    if path and path != run.path:
        out.append(f"path: the file's network is for {path!r}, the recipe's path is {run.path!r}")
    if asks.sigma_data is not None and run.path == "ve" and abs(asks.sigma_data - run.sigma_data) > 1e-6:
        out.append(
            f"sigma_data: the file's network was trained with {asks.sigma_data:g}, the recipe has {run.sigma_data:g}"
        )
    shape = data.shape
    if asks.side is not None and len(shape) == 3 and (asks.channels, asks.side) != shape[:2]:
        made = f"{asks.channels} x {asks.side} x {asks.side}"
        out.append(f"data: the file's network is for {made}, the data are {' x '.join(map(str, shape))}")
    classes = _classes(run, data)
    if asks.classes is not None and asks.classes != classes:
        hint = f"; {in_data.asks(data, asks.classes)}" if classes and asks.classes else ""
        out.append(f"data: the file's network knows {asks.classes} classes, the recipe's {classes}{hint}")
    if asks.affine and isinstance(data, AbsentRows) and data.normalisation is None:
        out.append(
            f"data.mean: is missing; {data.path} is not here, and how its latents are scaled must be said: the file's "
            f"network takes z = a x + b with a {_text(asks.affine[0])}, b {_text(asks.affine[1])}"
        )
    return out


def suggestions(asks: Asks, run: Run, data: Rows) -> list[str]:
    """The overrides that would bring the recipe's model and sigma_data to what the file was built with; of rows that are
    not here also what they must be like."""
    out: list[str] = []
    wanted = _wanted(asks)
    kind = wanted.pop("kind", run.model.kind)
    have = built(run.model if kind == run.model.kind else KINDS[kind]())
    if kind != run.model.kind:
        out.append(f"model.kind={kind}")
    adm, ncsnpp = wanted.pop("adm", None), wanted.pop("ncsnpp", None)
    if adm is not None and (adm, ncsnpp) != (have.get("adm"), have.get("ncsnpp")):
        preset = _preset(adm, bool(ncsnpp), wanted.get("multipliers"))
        out.append(f"model.preset={preset}")
        have = edm.PRESETS[preset]
    published = {width: size for size, (width, _) in edm2.SIZES.items()}
    shape = tuple(wanted.get(k) for k in ("width", "depth", "heads"))
    size = next((name for name, numbers in dit.SIZES.items() if kind == "dit" and numbers == shape), None)
    if size and shape != tuple(have.get(k) for k in ("width", "depth", "heads")):
        out.append(f"model.size={size}")
        wanted = {k: v for k, v in wanted.items() if k not in ("width", "depth", "heads")}
    for key, value in wanted.items():
        if _same(have.get(key), value) or (
            key == "heads" and not {"width", "depth"} & {k for k in wanted if have.get(k) != wanted[k]}
        ):
            continue
        if key == "width" and kind == "edm2" and value in published:
            out.append(f"model.size={published[value]}")
        else:
            out.append(f"model.{key}={_yaml(value)}")
    unsaid = isinstance(data, AbsentRows) and "classes" not in data.known
    if asks.classes == 0 and getattr(run.model, "conditional", False) and (unsaid or _classes(run, data)):
        out.append("model.conditional=false")
    if asks.classes and not getattr(run.model, "conditional", True):
        out.append("model.conditional=true")
    if asks.sigma_data is not None and run.path == "ve" and asks.sigma_data != run.sigma_data:
        out.append(f"sigma_data={asks.sigma_data:g}")
    return out + (_rows(asks, data) if isinstance(data, AbsentRows) else [])


def _rows(asks: Asks, data: AbsentRows) -> list[str]:
    """The overrides that say of rows which are not here what the file's network needs."""
    out = []
    shape = data.shape if asks.side is None or asks.channels is None else (asks.channels, asks.side, asks.side)
    classes = data.known.get("classes") if not asks.classes else asks.classes
    if shape != data.shape or classes not in (None, data.known.get("classes", classes)):
        of = "" if classes is None else f",classes: {classes}"
        out.append(f"data.expects={{shape: [{','.join(map(str, shape))}]{of}}}")
    if asks.standard and data.scale != asks.standard:
        out += ["data.mean=null", "data.std=null", f"data.scale={asks.standard:g}"]
    if asks.affine and not _scaled_alike(asks.affine, data.normalisation):
        a, b = (part * shape[0] if len(part) == 1 else part for part in asks.affine)
        out += constants(a, b)
    elif data.normalisation and len(data.normalisation.mean) != shape[0] and not asks.standard:
        out += ["data.mean=null", "data.std=null"]
    return out


def constants(a: list[float], b: list[float]) -> list[str]:
    """The overrides that scale latents x as z = a x + b: scale (x - mean) / std with one scale for all channels."""
    if len({*a}) == 1 and not any(b) and len(a) > MANY:
        return ["data.mean=[0]", "data.std=[1]", f"data.scale={a[0]:g}"]
    if len({*a}) == 1 and not any(b):
        return [
            f"data.mean=[{','.join('0' for _ in a)}]",
            f"data.std=[{','.join('1' for _ in a)}]",
            f"data.scale={a[0]:g}",
        ]
    mean, std = [-y / x for x, y in zip(a, b)], [0.5 / x for x in a]
    return [f"data.mean={_text(mean)}", f"data.std={_text(std)}", "data.scale=0.5"]


def _scaled_alike(affine: tuple[list[float], list[float]], ours: Normalisation | None) -> bool:
    if ours is None:
        return False
    a, b = affine
    scale, shift = [ours.scale / s for s in ours.std], [-m * ours.scale / s for m, s in zip(ours.mean, ours.std)]
    a, b = (part * len(scale) if len(part) == 1 else part for part in (a, b))
    return len(a) == len(scale) and all(abs(x - y) <= 1e-3 * max(1, abs(x)) for x, y in zip(a + b, scale + shift))


def _wanted(asks: Asks) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in asks.model.items() if v is not None}


def doubts(asks: Asks, run: Run) -> list[str]:
    """What no file of the family says and no shape tells, so that the recipe's word is taken for it."""
    if asks.model.get("kind") == "dit" and asks.model.get("heads") is None:
        return [f"the number of heads is not in the file; the recipe's {built(run.model).get('heads')} are taken"]
    return []


def _preset(adm: bool, ncsnpp: bool, multipliers: tuple[int, ...] | None) -> str:
    fitting = [k for k, p in edm.PRESETS.items() if (p["adm"], p["ncsnpp"]) == (adm, ncsnpp)]
    return next((k for k in fitting if edm.PRESETS[k]["multipliers"] == multipliers), fitting[0])


def _classes(run: Run, data: Rows) -> int:
    return data.classes if getattr(run.model, "conditional", True) else 0


def _same(have: Any, wanted: Any) -> bool:
    """Whether a key is as it is wanted; of a section only what is said of it is compared."""
    return have == (have | wanted if isinstance(have, dict) and isinstance(wanted, dict) else wanted)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    text = (
        str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text.replace(" ", "")


def normalisation(asks: Asks, data: Any) -> list[str]:
    """Whether the data's latents are scaled as those that the file's network was trained on: one sentence, or none.

    Both are z = a x + b, channel by channel, of the autoencoder's own latents x.
    """
    if asks.affine is None:
        return []
    a, b = ([float(x) for x in part] for part in asks.affine)
    ours = getattr(data, "normalisation", None)
    if ours is None:
        return [f"the network takes latents z = a x + b with a {_text(a)}, b {_text(b)}; the data do not say theirs"]
    scale, shift = [ours.scale / s for s in ours.std], [-m * ours.scale / s for m, s in zip(ours.mean, ours.std)]
    a, b = (part * len(scale) if len(part) == 1 else part for part in (a, b))
    if _scaled_alike(asks.affine, ours):
        return [f"the data's latents are scaled as the network's were: a {_text(scale)}, b {_text(shift)}"]
    return [
        f"WARNING: the network was trained on latents z = a x + b with a {_text(a)}, b {_text(b)}, the data have "
        f"a {_text(scale)}, b {_text(shift)}; set {' '.join(constants(a, b))}"
    ]


def _text(values: list[float]) -> str:
    return "[" + ",".join(f"{v + 0.0:.6g}" for v in values) + "]"
