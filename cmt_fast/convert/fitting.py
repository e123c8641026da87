"""What a checkpoint was made for against what a recipe does: conflicts, overrides that would fit, how latents are scaled."""

from __future__ import annotations

from typing import Any

from cmt_fast.convert.families import KINDS, Asks, Family, built
from cmt_fast.convert.files import Source
from cmt_fast.data import classes as in_data
from cmt_fast.models import dit, edm, edm2
from cmt_fast.run.workspace import Workspace


def conflicts(source: Source, family: Family, asks: Asks, work: Workspace) -> list[str]:
    """What the file says it was made for and the recipe does otherwise, though every shape may fit."""
    run, out = work.run, list(asks.against)
    have = {"adm": None, **built(run.model)}
    for key, value in _wanted(asks).items():
        if have.get(key) != value and (run.model.kind == asks.model.get("kind", run.model.kind) or key == "kind"):
            key = "preset (adm)" if key == "adm" else key
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
    shape = work.data.shape
    if asks.side is not None and len(shape) == 3 and (asks.channels, asks.side) != shape[:2]:
        made = f"{asks.channels} x {asks.side} x {asks.side}"
        out.append(f"data: the file's network is for {made}, the data are {' x '.join(map(str, shape))}")
    classes = _classes(work)
    if asks.classes is not None and asks.classes != classes:
        hint = f"; {in_data.asks(work.data, asks.classes)}" if classes and asks.classes else ""
        out.append(f"data: the file's network knows {asks.classes} classes, the recipe's {classes}{hint}")
    return out


def suggestions(asks: Asks, work: Workspace) -> list[str]:
    """The overrides that would bring the recipe's model and sigma_data to what the file was built with."""
    run, out = work.run, []
    wanted = _wanted(asks)
    kind = wanted.pop("kind", run.model.kind)
    have = built(run.model if kind == run.model.kind else KINDS[kind]())
    if kind != run.model.kind:
        out.append(f"model.kind={kind}")
    adm = wanted.pop("adm", None)
    if adm is not None and adm != have.get("adm"):
        preset = _preset(adm, wanted.get("multipliers"))
        out.append(f"model.preset={preset}")
        have = edm.PRESETS[preset]
    published = {width: size for size, (width, _) in edm2.SIZES.items()}
    shape = tuple(wanted.get(k) for k in ("width", "depth", "heads"))
    size = next((name for name, numbers in dit.SIZES.items() if kind == "dit" and numbers == shape), None)
    if size and shape != tuple(have.get(k) for k in ("width", "depth", "heads")):
        out.append(f"model.size={size}")
        wanted = {k: v for k, v in wanted.items() if k not in ("width", "depth", "heads")}
    for key, value in wanted.items():
        if have.get(key) == value or (
            key == "heads" and not {"width", "depth"} & {k for k in wanted if have.get(k) != wanted[k]}
        ):
            continue
        if key == "width" and kind == "edm2" and value in published:
            out.append(f"model.size={published[value]}")
        else:
            out.append(f"model.{key}={_yaml(value)}")
    if asks.classes == 0 and _classes(work) and hasattr(run.model, "conditional"):
        out.append("model.conditional=false")
    if asks.sigma_data is not None and run.path == "ve" and asks.sigma_data != run.sigma_data:
        out.append(f"sigma_data={asks.sigma_data:g}")
    return out


def _wanted(asks: Asks) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in asks.model.items() if v is not None}


def doubts(asks: Asks, work: Workspace) -> list[str]:
    """What no file of the family says and no shape tells, so that the recipe's word is taken for it."""
    if asks.model.get("kind") == "dit" and asks.model.get("heads") is None:
        return [f"the number of heads is not in the file; the recipe's {built(work.run.model).get('heads')} are taken"]
    return []


def _preset(adm: bool, multipliers: tuple[int, ...] | None) -> str:
    fitting = [k for k, p in edm.PRESETS.items() if p["adm"] == adm]
    return next((k for k in fitting if edm.PRESETS[k]["multipliers"] == multipliers), fitting[0])


def _classes(work: Workspace) -> int:
    return work.data.classes if getattr(work.run.model, "conditional", True) else 0


def _yaml(value: Any) -> str:
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
    if len(a) == len(scale) and all(abs(x - y) <= 1e-3 * max(1, abs(x)) for x, y in zip(a + b, scale + shift)):
        return [f"the data's latents are scaled as the network's were: a {_text(scale)}, b {_text(shift)}"]
    mean, std = [-y / x for x, y in zip(a, b)], [0.5 / x for x in a]
    return [
        f"WARNING: the network was trained on latents z = a x + b with a {_text(a)}, b {_text(b)}, the data have "
        f"a {_text(scale)}, b {_text(shift)}; set data.mean={_text(mean)} data.std={_text(std)} data.scale=0.5"
    ]


def _text(values: list[float]) -> str:
    return "[" + ",".join(f"{v + 0.0:.6g}" for v in values) + "]"
