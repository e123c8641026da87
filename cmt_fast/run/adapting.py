"""A recipe for one's own store, made of one of the package: its method and settings, a network that fits the rows, and
nothing that has to be brought. What was changed, and why, stands in the new recipe's header.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

from cmt_fast.config import loading, recipes, scalars
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES, Latents, Run
from cmt_fast.data import opening
from cmt_fast.data.latents import Store
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.run import networks

TOKENS = 256  # of a dit on pixels: the patch is the smallest that leaves no more
PRESETS = {  # of EDM's U-Nets, by the side of their images
    32: ("cifar10", "cifar10-ncsnpp"),
    64: ("ffhq64", "afhqv2-64", "ffhq64-ncsnpp", "afhqv2-64-ncsnpp", "imagenet64"),
}
WARM = 10  # an EMA looks back over at most 1 / WARM of its stage


PLAIN = re.compile(r"[\w./][\w./+-]*")  # text that needs no quotes


class Adapted(NamedTuple):
    """A new recipe's text, and what differs from the one that it was made of, a sentence each."""

    text: str
    changed: list[str]


class Rows(NamedTuple):
    """What the store holds: shape (C, H, W) of a row, classes (0: none), number of rows, whether they are pixels."""

    shape: tuple[int, ...]
    classes: int
    n: int
    pixels: bool


def adapted(name: str, store: str, like: str, images: int | None = None, weights: str | None = None) -> Adapted:
    """The recipe `name` for a store, like the recipe `like`. It is checked against the store before it is returned.

    images: of mid and post together, to which all lengths are scaled; weights: a file for the like-recipe's perceptual
    distance. Raises ConfigError where the recipe is of another world than the store, and for a store that cannot be read.
    """
    tree = scalars.natural(scalars.parse(recipes.recipe_text(like), like))
    run = loading.load(like)
    if run.data.kind == "gmm" or run.model.kind == "mlp":
        valid = ", ".join(r for r in recipes.recipes() if r != "gmm")
        raise ConfigError(
            f"--like: {like!r} is of points in a plane, and a store holds images or latents; valid are {valid}"
        )
    try:
        opened = opening.load(cast(Any, Latents)(path=store))
    except ValueError as error:
        raise ConfigError(f"--data: {error}".replace("data.path: ", "")) from None
    rows = Rows(tuple(opened.shape), opened.classes, opened.n, opened.index.kind == "pixels")
    changed: list[str] = []
    tree["name"] = name
    _data(tree, run, store, opened, rows, changed)
    _model(tree, run, rows, changed)
    _teacher(tree, changed)
    for stage in _stages(tree).values():
        _distance(stage, rows, weights, changed)
    if weights and not any("perceptual" in stage for stage in _stages(tree).values()):
        raise ConfigError(
            f"--perceptual: {like!r} has no perceptual distance that could read it on rows of {rows.shape}"
        )
    _labels(tree, rows, changed)
    _judged(tree, rows, changed)
    if images:
        _shorten(tree, images, changed)
    changed = list(dict.fromkeys(changed))
    made = loading.build(json.loads(json.dumps(tree)))
    try:
        networks.check(made, rows.shape, rows.classes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Adapted(_written(tree, made, like, rows, changed), changed)


def _stages(tree: dict) -> dict[str, dict]:
    return {s: tree[s] for s in STAGES if tree.get(s)}


def _data(tree: dict, run: Run, store: str, opened: Store, rows: Rows, changed: list[str]) -> None:
    """The store's path and what it must hold; numbers that normalise the like-recipe's latents where they can be the same."""
    before = tree["data"]
    data: dict[str, Any] = {"kind": "latents", "path": store}
    kept = {k: before[k] for k in ("mean", "std", "scale") if k in before}
    if kept and not rows.pixels and len(kept.get("mean", ())) == rows.shape[0]:
        data |= kept
        changed.append(
            "data.mean, std and scale are kept, for latents of the same autoencoder; leave them out for another's"
        )
    elif kept:
        changed.append("data.mean, std and scale are left out: the store's rows are not of that autoencoder")
    if before.get("flip") and (rows.pixels or opened.index.flips):
        data["flip"] = True
    elif before.get("flip"):
        changed.append("data.flip is left out: the store holds no mirror images")
    data["expects"] = {"shape": list(rows.shape), "classes": rows.classes}
    tree["data"] = data
    changed.insert(0, f"data: {store}, {rows.n:,} rows of {' x '.join(map(str, rows.shape))}, {_classes(rows)}")


def _classes(rows: Rows) -> str:
    return f"{rows.classes} class{'es' * (rows.classes > 1)}" if rows.classes else "no labels"


def _model(tree: dict, run: Run, rows: Rows, changed: list[str]) -> None:
    """The like-recipe's network where it fits the rows, else the nearest that does."""
    model, (_, side, width) = tree["model"], rows.shape
    if side != width:
        raise ConfigError(f"--data: rows of {rows.shape} are not square, and every network here needs square ones")
    kind = model["kind"]
    if kind == "edm" and rows.pixels and side in PRESETS:
        fits = PRESETS[side]
        if model.get("preset", "cifar10") not in fits:
            preset = model.get("preset", "cifar10")
            own = next((p for p in fits if p.endswith("-ncsnpp") == preset.endswith("-ncsnpp")), fits[0])
            changed.append(f"model.preset: {own} in place of {preset}, the U-Net for {side} pixels")
            model["preset"] = own
    elif kind == "edm" or (kind == "edm2" and side % 8):
        why = (
            "a U-Net of EDM has presets for 32 and 64 pixels"
            if kind == "edm"
            else "its U-Net halves the side three times"
        )
        of = "pixels" if rows.pixels else "latents"
        size = "S" if kind == "edm" or model.get("size") in ("XS", "S") else "B"
        tree["model"] = model = {"kind": "dit", "size": size, "patch": 2}
        changed.append(f"model: a dit of size {size} in place of {kind}; {why}, and rows are {of} of side {side}")
        for stage in _stages(tree).values():
            if stage.pop("augment", None):
                changed.append("augment is left out: a dit is not told what was done to its images")
            if stage["objective"].pop("uncertainty", None):
                changed.append("objective.uncertainty is left out: a dit has it with model.log_variance=true")
    if model["kind"] == "dit":
        _patch(model, rows, changed)
    elif bool(rows.classes) != model.get("conditional", True):
        model["conditional"] = bool(rows.classes)
        changed.append(f"model.conditional: {str(model['conditional']).lower()}, as the store has {_classes(rows)}")


def _patch(model: dict, rows: Rows, changed: list[str]) -> None:
    """A patch that divides the side and leaves no more than TOKENS tokens, or as many as the published latents have."""
    side, before = rows.shape[1], model.get("patch", 2)
    most = TOKENS if rows.pixels else max(TOKENS, (side // before) ** 2 if side % before == 0 else 0)
    fits = [p for p in range(1, side + 1) if side % p == 0 and (side // p) ** 2 <= most]
    patch = before if before in fits else next((p for p in fits if p >= before), fits[-1])
    if patch != before:
        changed.append(f"model.patch: {patch}, which makes {(side // patch) ** 2} tokens of a side of {side}")
    model["patch"] = patch


def _teacher(tree: dict, changed: list[str]) -> None:
    """Teachers and guides of other runs are not at hand: the run's own pre-trained stage teaches, and nothing guides it."""
    for stage in _stages(tree).values():
        teacher = stage.get("teacher") or ""
        if "/" in teacher:
            other = Path(teacher).parent.name
            if tree.get("pre") is None:
                if other not in recipes.recipes():
                    raise ConfigError(
                        f"--like: its teacher {teacher!r} is of a run that no recipe of the package makes"
                    )
                theirs = scalars.natural(scalars.parse(recipes.recipe_text(other), other))
                tree["pre"] = theirs["pre"]
                changed.append(
                    f"pre is that of {other}, whose run taught it; here the student's own network is trained so"
                )
            stage["teacher"] = "pre"
            changed.append("the teacher is this run's own pre, not another run's")
        if stage.pop("autoguidance", None):
            changed.append("autoguidance is left out: it needs a weaker network of another run")
    order = {s: tree.get(s) for s in STAGES if s in tree}
    rest = {k: v for k, v in tree.items() if k not in order}
    at = list(rest).index("sampler") if "sampler" in rest else len(rest)
    items = list(rest.items())
    tree.clear()
    tree.update([*items[:at], *order.items(), *items[at:]])


def _distance(stage: dict, rows: Rows, weights: str | None, changed: list[str]) -> None:
    """A perceptual distance with the file that was given, else one that needs none."""
    for objective in (stage["objective"], (stage.get("anchor") or {}).get("objective") or {}):
        distance = objective.get("distance")
        if distance not in PERCEPTUAL:
            continue
        fits = distance == "latent_lpips" or (rows.shape[0] in (1, 3) and rows.shape[1] >= 16)
        if weights and fits:
            stage["perceptual"] = {"weights": weights}
            changed.append(f"the perceptual network of {distance} is {weights}")
        else:
            objective["distance"] = "l2"
            stage.pop("perceptual", None)
            why = (
                "needs a file of weights (--perceptual)"
                if fits
                else "looks at images of 1 or 3 channels and 16 pixels or more"
            )
            changed.append(f"distance: l2 in place of {distance}, which {why}")


def _labels(tree: dict, rows: Rows, changed: list[str]) -> None:
    """Without labels, or with one class, nothing is dropped and nothing guides."""
    if rows.classes > 1:
        return
    left_out = f"label dropout and guidance are left out: the store has {'one class' if rows.classes else 'no labels'}"
    for stage in _stages(tree).values():
        objective, trajectories = stage["objective"], stage.get("trajectories") or {}
        places = [
            (stage, ("label_dropout", "teacher_guidance")),
            (trajectories, ("guidance", "omega_max", "omega_beta")),
        ]
        places.append((objective, ("omega", "kappa", "guide_t_min", "guide_t_max")))
        found = [part.pop(key) for part, keys in places for key in keys if key in part]
        if objective.get("distance") == "features" and not rows.classes:
            objective["distance"] = "l2"
            changed.append("distance: l2 in place of features, whose classifier needs labels")
        if found:
            changed.append(left_out)
    if (tree.get("sampler") or {}).pop("guidance", None):
        changed.append(left_out)


def _judged(tree: dict, rows: Rows, changed: list[str]) -> None:
    """A distance that needs no file, and one process without DeepSpeed."""
    before = tree.get("eval") or {}
    if before.get("metric", "frechet") != "frechet" or before.get("reference"):
        tree["eval"] = {"steps": before.get("steps", [1, 2]), "n": 4000, "n_during": 2000}
        changed.append("eval: the Fréchet distance to the store's own rows, which needs no file; 4,000 samples")
    if tree.pop("engine", None):
        changed.append("engine: local, which needs no DeepSpeed; engine=zero shards a large network")
    tree.pop("features", None)


def _shorten(tree: dict, images: int, changed: list[str]) -> None:
    """All lengths by the factor that makes mid and post `images` together; an EMA never longer than its stage allows."""
    stages = _stages(tree)
    factor = images / sum(stages[s]["images_nimg"] for s in ("mid", "post"))
    for stage in stages.values():
        batch = stage.get("batch", 128)
        for key in [k for k in stage if k.endswith("_nimg")]:
            least = batch if key not in ("warmup_nimg", "lr_knee_nimg") else 1
            stage[key] = max(least, round(stage[key] * factor / batch) * batch) if stage[key] else stage[key]
        warmup = stage["objective"].get("warmup_nimg")
        if warmup:
            stage["objective"]["warmup_nimg"] = round(warmup * factor)
        steps = max(1, stage["images_nimg"] // batch)
        longest = max(0.0, 1 - WARM / steps)
        for track in stage.get("ema", []):
            if track["kind"] == "constant" and track.get("beta", 0.999) > longest:
                track |= {"beta": float(f"{longest:.3g}"), "ramp": True}
                changed.append(
                    "ema.beta is smaller where a stage became short: an EMA looks back over a tenth of it, after a ramp"
                )
    lengths = ", ".join(f"{name} {stage['images_nimg']:,}" for name, stage in stages.items())
    changed.append(f"lengths are {factor:.3g} of its own (--images {images}), in images: {lengths}")


def _written(tree: dict, made: Run, like: str, rows: Rows, changed: list[str]) -> str:
    """The recipe's text: its header, then its keys in the order of the schema, parts without parts in one line."""
    first = f"# {tree['name']}: rows of {' x '.join(map(str, rows.shape))}, {_classes(rows)}; after the recipe {like}."
    header = [
        first,
        f"# Taken from {like}: path, objectives, solver, optimizers, rates, batches, EMA. Changed for this store:",
    ]
    header += [f"# - {line}" for line in changed]
    if "pre" in made.stages:
        header.append(
            "# `pre` trains the teacher on this store; a public network of the same kind can be imported in its place."
        )
    body = []
    for key in (f.name for f in dataclasses.fields(Run) if f.name in tree):  # type: ignore[arg-type]
        if key in STAGES and tree[key]:
            body += ["", f"{key}:", *(f"  {k}: {flow(v)}" for k, v in tree[key].items())]
        else:
            body += [""] * (key == "sampler") + [f"{key}: {flow(tree[key])}"]
    return "\n".join([*header, *body]) + "\n"


def flow(value: Any) -> str:
    """A value in one line of YAML; text in quotes where it would not be read as it stands."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return (
            value
            if PLAIN.fullmatch(value) and value.lower() not in scalars.NULLS
            else json.dumps(value, ensure_ascii=False)
        )
    return json.dumps(value)
