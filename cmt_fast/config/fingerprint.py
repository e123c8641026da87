"""What of a run its weights depend on, as a digest, and how two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from cmt_fast.config import paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.loading import dump
from cmt_fast.config.renames import first_names
from cmt_fast.config.schema import Run, Trajectories

# keys of a stage that say in what parts and how a step is computed
HOW = ("micro_batch", "cuda_graph")
# keys of a stage that change no weight, or its rounding alone as the number of processes does
WATCHING = ("checkpoint_every_nimg", "checkpoint_every_s", "eval_every_nimg", "grid_every_nimg", *HOW)
# keys of a stage and of a run that say what becomes of a step that is not finite: the run may go on under others
FAILING = ("on_nonfinite", "nonfinite_limit")
# what lays the same work out otherwise, of the model and of a stage's trajectories: it changes no weight, or its rounding alone;
# taken for these, which are the defaults, where it is asked whether a run may go on
MODEL_LAYOUT = {"checkpoint_activations": False}
ROLLOUT_LAYOUT = {"rollout_batch": Trajectories.rollout_batch}
# keys of the data that say what is asked of them, not what they are
ASKED = ("unchecked",)
# keys of a run that say where and how it is computed
WHERE = ("device", "loader", "tensorboard", "loggers", "engine", "zero_stage", "zero_teacher", "timeout_s", "saves")


def digest(run: Run) -> str:
    """sha256 of the resolved run, without what does not change its numbers: where and in what parts it is computed."""
    tree = {k: v for k, v in _dumped(run).items() if k not in (*WHERE, *FAILING)}
    for stage in tree.values():
        if isinstance(stage, dict):
            for key in (*HOW, *FAILING):
                stage.pop(key, None)
    return _sha(tree)


def stage_facts(run: Run, name: str) -> dict:
    """All of a run that a stage's weights depend on: data, model, path, seed, its own settings and its ancestors'.

    Of what lies outside the run only the name is in it; its checksums are in the stage's manifest. How often it is
    looked at or saved is not in it: that may change while a stage is under way.
    """
    tree = _dumped(run)
    facts = {k: tree[k] for k in ("data", "model", "path", "sigma_data", "seed")}
    for member in (name, *run.ancestors(name)):
        facts[member] = {k: v for k, v in tree[member].items() if k not in (*WATCHING, *FAILING)}
        if facts[member]["trajectories"] and run.path != "ve" and (asked := run.asked(member)) != "any":
            facts[member]["asked"] = asked  # by another stage, which is no ancestor
    return facts


def content(run: Run, name: str) -> dict:
    """`stage_facts` without what only says where data, files and other runs are, or what is expected of data: rows and
    checksums are compared apart, by `check_inputs`. What lays the same work out otherwise is one for all: a stage goes on by it.
    """
    facts = paths.without(stage_facts(run, name))
    facts["model"] = _laid_out(facts["model"], MODEL_LAYOUT)
    for member in (name, *run.ancestors(name)):
        stage = facts[member]
        guide = stage["autoguidance"]
        stage["teacher"] = _anywhere(stage["teacher"])
        stage["trajectories"] = stage["trajectories"] and _laid_out(stage["trajectories"], ROLLOUT_LAYOUT)
        stage["autoguidance"] = guide and {**guide, "network": _anywhere(guide["network"])}
    return {**facts, "data": {k: v for k, v in facts["data"].items() if k != "expects"}}


def _anywhere(name: str | None) -> str | None:
    """RUN/STAGE of another run, wherever that is."""
    return f"RUN/{name.rpartition('/')[2]}" if name and "/" in name else name


def check_inputs(name: str, had: dict, has: dict) -> None:
    """Raises ConfigError unless a stage that has begun reads what it read outside its run, by checksums; where is no matter."""
    inside = lambda others: {key: {k: v for k, v in about.items() if k != "stage"} for key, about in others.items()}
    moved = changed(inside(had), inside(has))
    if moved:
        raise ConfigError(f"{name}.{moved[0]}: has changed since this stage began; start it in a new folder")


def stage_digest(run: Run, name: str, others: dict | None = None, changes: Sequence[dict] = ()) -> str:
    """sha256 of `stage_facts`, of what the stage reads outside its run and of changes while it was under way: equal digests mean
    equal weights."""
    more = ({"others": others} if others else {}) | ({"changes": list(changes)} if changes else {})
    return _sha(stage_facts(run, name) | more)


def content_digest(run: Run, name: str) -> str:
    """sha256 of `content`: the same where a run and what it reads were moved."""
    return _sha(content(run, name))


def _dumped(run: Run) -> dict:
    """The run as plain data, its data without what is only asked of them."""
    tree = dump(run)
    return {**tree, "data": {k: v for k, v in tree["data"].items() if k not in ASKED}}


def _laid_out(tree: dict, layout: dict) -> dict:
    """A section with one layout in the place of its own, where it has such keys."""
    return {**tree, **{key: value for key, value in layout.items() if key in tree}}


def _sha(tree: dict) -> str:
    return hashlib.sha256(json.dumps(first_names(tree), sort_keys=True).encode()).hexdigest()


def changed(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The dotted keys in which two dumped runs differ, as `key: old -> new`."""
    out = []
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += changed(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a} -> {b}")
    return out
