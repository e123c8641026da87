"""Keys of other versions: renamed ones are read under both names, and neither a rename nor a new key changes a digest."""

from __future__ import annotations

from typing import Any

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema.stage import STAGES

# where a key stands -> its name of before -> today's; "stage": directly in a stage
RENAMED = {"stage": {"clip": "grad_clip_norm"}, "anchor": {"share": "fraction"}}
# a key that came later, `stage.` before one of any stage, its kind before one of some kinds alone -> its default, under which
# it is no part of a digest
ADDED: dict[str, Any] = {
    "data.class_ids": None,
    "data.classes": None,
    "data.layout": "chw",
    "data.range": None,
    "eval.labels": "data",
    "eval.on_error": "continue",
    "features.holdout": 0.0,
    "features.precision": "fp32",
    "model.dropout_max_side": None,
    "model.guided": False,
    "model.velocity_head": None,
    "model.log_variance": False,
    "model.wide_head": None,
    "nonfinite_limit": 10,
    "on_nonfinite": "stop",
    "sampler.told_guidance": [1.0, 0.0, 1.0],
    "sampler.shift": 1.0,
    "saves": "background",
    "stage.augment": None,
    "stage.checkpoint_every_s": 1200.0,
    "stage.nonfinite_limit": None,
    "stage.objective.imeanflow.head": False,
    "stage.objective.imeanflow.omega_beta": 1.0,
    "stage.objective.imeanflow.omega_max": 1.0,
    "stage.objective.scd.uncertainty": False,
    "stage.objective.sct.uncertainty": False,
    "stage.objective.law": "logit_normal",
    "stage.objective.shift": 1.0,
    "stage.objective.velocity": "data",
    "stage.on_nonfinite": None,
    "stage.rounding_limit": 0.1,
    "stage.trajectories.budget_forwards": None,
    "stage.trajectories.omega_beta": 1.0,
    "stage.trajectories.omega_max": 1.0,
    "stage.trajectories.pairs": "auto",
}
FIRST = {place: {now: before for before, now in keys.items()} for place, keys in RENAMED.items()}


def place(parents: tuple[str, ...]) -> str:
    """Where a key with these parents stands, as RENAMED names it; "" elsewhere."""
    if len(parents) == 1 and parents[0] in STAGES:
        return "stage"
    return "anchor" if len(parents) == 2 and parents[0] in STAGES and parents[1] == "anchor" else ""


def today(parents: tuple[str, ...], key: str) -> str:
    """A key's name of today."""
    return RENAMED.get(place(parents), {}).get(key, key)


def renamed(tree: Any, parents: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """Plain data with today's keys, and for each that had a name of before `old is now new`.

    Raises ConfigError where both names are given.
    """
    if not isinstance(tree, dict):
        return tree, []
    out, notes = {}, []
    for key, value in tree.items():
        now = today(parents, key)
        if now != key:
            old, new = (".".join((*parents, name)) for name in (key, now))
            if now in tree:
                raise ConfigError(f"is now {new}, and both are given", old)
            notes.append(f"{old} is now {new}")
        out[now], more = renamed(value, (*parents, str(key)))
        notes += more
    return out, notes


def first_names(tree: Any, parents: tuple[str, ...] = ()) -> Any:
    """Plain data of a dumped run, or of a part at its place, as the first version that knew its keys would have written it:
    every key under the name that it had first, and none that came later and says nothing new.
    """
    if not isinstance(tree, dict):
        return tree
    before, where = (
        FIRST.get(place(parents), {}),
        ("stage", *parents[1:]) if parents[:1] in [(s,) for s in STAGES] else parents,
    )
    kind = (tree["kind"],) if isinstance(tree.get("kind"), str) else ()
    names = lambda key: {".".join((*where, *of, str(key))) for of in ((), kind)} & ADDED.keys()
    came_later = lambda key, value: any(ADDED[name] == value for name in names(key))
    return {
        before.get(key, key): first_names(value, (*parents, str(key)))
        for key, value in tree.items()
        if not came_later(key, value)
    }
