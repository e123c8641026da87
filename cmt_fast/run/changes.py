"""Settings of a stage that are changed while it is under way: `cmt train ... --change post.lr=1e-4`.

A change takes effect at the newest checkpoint. It is kept in run.json as it is asked for, and from its first checkpoint on in
every manifest of the stage, which counts: where the checkpoint that a change was asked at turns out damaged, the change moves to
the one before. Steps, rows and images go on from there, so a row of data is drawn as often as without it, and the digest of the
stage's configuration is of its changes too: it is not that of a stage that was begun so.

    {"step", "nimg", "rows", "log_every": as of schedule.Since, "keys": {key: [before, after]}}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.fingerprint import ROLLOUT_LAYOUT, WATCHING
from cmt_fast.config.overrides import apply as override
from cmt_fast.config.renames import today
from cmt_fast.config.schema import Run
from cmt_fast.run import folder as folders
from cmt_fast.run.resolved import ResolvedStage, resolve
from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint, files, sound

KEYS = (
    "lr", "lr_schedule", "lr_knee_nimg", "warmup_nimg", "images_nimg", "batch", "precision", "rounding_limit",
    "weight_decay", "eps", "grad_clip_norm",
)  # fmt: skip
Change = dict[str, Any]
Asked = dict[str, dict[str, list]]  # stage -> key -> [before, after]


def asked(run: Run, folder: Path, texts: Sequence[str]) -> tuple[Run, Asked]:
    """The run with what `--change` asks for, and what that changes: nothing for a value that it has already.

    Raises ConfigError naming what cannot be changed, and why.
    """
    tree, out = loading.dump(run), Asked()
    for text in texts:
        name, key = _named(run, text)
        before = tree[name][key]
        changed = json.loads(json.dumps(tree))
        override(changed, [f"{name}.{key}={text.partition('=')[2]}"])
        run = loading.build(changed)
        tree = loading.dump(run)
        after = tree[name][key]
        if after == before:
            continue
        if key == "precision" and "fp16" in (before, after):
            raise ConfigError(
                f"--change: {name}.precision: {before} -> {after}; fp16 has a loss scale that the others have not, so it is "
                "neither left nor entered on the way; valid are fp32, tf32, bf16, bf16-stream of a stage in one of these"
            )
        first = out.setdefault(name, {}).get(key, [before])[0]
        out[name][key] = [first, after]
    for name, keys in out.items():
        t = run.stages[name].trajectories
        if t and t.budget_forwards is not None and "images_nimg" in keys:
            raise ConfigError(
                f"--change: {name}.images_nimg follows from {name}.trajectories.budget_forwards, and was settled when the stage "
                "began; it cannot be changed any more"
            )
        _can(run, folder, name)
        if "batch" in keys and resolve(run, name).cache:
            raise ConfigError(
                f"--change: {name}.batch cannot be changed: trajectories.cache gives each step its rows by its number, and an "
                "epoch would have some twice and others not at all"
            )
    return run, out


def _named(run: Run, text: str) -> tuple[str, str]:
    """Stage and key that one `--change` names. Raises ConfigError."""
    path, equals, raw = text.partition("=")
    name, _, key = path.strip().partition(".")
    if not equals or not raw.strip() or not key:
        raise ConfigError(f"--change: {text!r} is not of the form STAGE.KEY=VALUE, as post.lr=1e-4")
    if name not in run.stages:
        raise ConfigError(
            f"--change: {path.strip()!r} is no key of a stage; stages are {', '.join(run.stages)}{nearest(name, run.stages)}"
        )
    key = today((name,), key)
    if key in WATCHING or key.removeprefix("trajectories.") in ROLLOUT_LAYOUT:
        raise ConfigError(f"--change: {name}.{key} changes no weight; give it without --change, as {text}")
    if key not in KEYS:
        raise ConfigError(
            f"--change: {name}.{key} cannot be changed while a stage is under way; those that can are {', '.join(KEYS)}"
            f"{nearest(key, KEYS)}"
        )
    return name, key


def _can(run: Run, folder: Path, name: str) -> None:
    """Raises ConfigError for a stage that has not begun, is finished, or that a later one was begun from."""
    found = checkpoint.newest(folder / name) if checkpoint.steps(folder / name) else None
    if found is None:
        raise ConfigError(
            f"--change: {name} of {folder} has not begun; set its keys without --change, as {name}.lr=1e-4"
        )
    if found.manifest.get("done"):
        raise ConfigError(
            f"--change: {name} of {folder} is finished; what it was trained by cannot be changed any more"
        )
    later = [s for s in run.stages if name in run.ancestors(s) and checkpoint.steps(folder / s)]
    if later:
        raise ConfigError(f"--change: {later[0]} of {folder} was begun from {name}; it would be of another {name}")
    length, seen = resolve(run, name, folder).config.images_nimg, found.manifest["nimg"]
    if length <= seen:
        raise ConfigError(f"--change: {name}.images_nimg: {length:,} is not above the {seen:,} images that it has seen")


def recorded(folder: Path) -> dict[str, list[Change]]:
    """The changes of a run by stage, as its run.json has them; where that is gone or damaged, as the manifests of its stages do;
    {} where there is no run."""
    try:
        return dict(folders.about_run(folder).get("changes") or {})
    except (OSError, ValueError):
        return made(folder)


def made(folder: Path) -> dict[str, list[Change]]:
    """The changes by which the stages of a run were trained, as the manifests of their newest checkpoints have them."""
    out = dict[str, list[Change]]()
    for name in sound.STAGES:
        with contextlib.suppress(checkpoint.CheckpointError):
            for step in reversed(checkpoint.steps(folder / name)):
                with contextlib.suppress(checkpoint.CheckpointError):
                    found = checkpoint.sized(checkpoint.folder_of(folder / name, step)).manifest.get("changes")
                    out |= {name: list(found)} if found else {}
                    break
    return out


def before(run: Run, name: str, entries: Sequence[Change]) -> list[Run]:
    """A run as a stage was trained by it before each of its changes, the first one first."""
    out: list[Run] = []
    for entry in reversed(entries):
        run = onto(run, {name: {key: [after, was] for key, (was, after) in entry["keys"].items()}})
        out.insert(0, run)
    return out


def adopted(run: Run, folder: Path) -> tuple[Run, list[str]]:
    """A recipe as the run in `folder` goes on with it: a key that was changed there, and that the recipe has as it was before,
    is as it was changed to. Also a line for each.
    """
    tree, notes = loading.dump(run), []
    for name, entries in recorded(folder).items():
        if name not in run.stages:
            continue
        for key, (before, after, step) in _over(entries).items():
            if tree[name].get(key) == before != after:
                tree[name][key] = after
                notes.append(f"{name}.{key} is {after} since step {step:,} (--change)")
    return (loading.build(tree) if notes else run), notes


def _over(entries: Iterable[Change]) -> dict[str, tuple[Any, Any, int]]:
    """Of a list of changes by key: before all, after all, and the step of the last."""
    out: dict[str, tuple[Any, Any, int]] = {}
    for entry in entries:
        for key, (before, after) in entry["keys"].items():
            out[key] = (out[key][0] if key in out else before, after, entry["step"])
    return out


def onto(run: Run, wanted: Asked) -> Run:
    """A run with what is asked for."""
    if not wanted:
        return run
    tree = loading.dump(run)
    for name, keys in wanted.items():
        tree[name] |= {key: after for key, (_, after) in keys.items()}
    return loading.build(tree)


def placed(stage: ResolvedStage, manifest: Mapping[str, Any] | None, entries: Sequence[Change]) -> tuple[Change, ...]:
    """The changes of a stage that goes on from a checkpoint: those that it was trained by, and as one at its own step those that
    it does not know. None of a stage that begins anew: it begins by its settings of today.

    stage: by the settings of today; entries: as they were asked for, in order.
    """
    if manifest is None:
        return ()
    known = tuple(manifest.get("changes") or ())
    new = _over(entry for entry in entries if entry not in known)
    keys = {key: [before, after] for key, (before, after, _) in new.items() if before != after}
    if not keys:
        return known
    had = stage.replaced(**{key: before for key, (before, _) in keys.items()}).changed(known)
    plan, step = had.schedule, manifest["step"]
    rows = plan.rows_before(step, had.rows[0])
    return (*known, {"step": step, "nimg": manifest["nimg"], "rows": rows, "log_every": plan.log_every, "keys": keys})


def as_of(stage: ResolvedStage, step: int) -> ResolvedStage:
    """A stage as its step `step`, from 1, was taken: without the changes that came later, or of which no step was taken yet."""
    later = [entry for entry in stage.changes if "nimg" not in entry or entry["step"] >= step]
    keys = {key: before for key, (before, _, _) in _over(later).items()}
    return stage.replaced(**keys).changed([entry for entry in stage.changes if entry not in later])


def pending(had: dict[str, list[Change]], wanted: Asked) -> dict[str, list[Change]]:
    """The changes of a run with those that are asked for; where they count from `counted` finds out. The same on all ranks, of
    which one may see a file that another has written by now: every rank must call it.
    """
    more = {name: [*had.get(name, ()), {"step": 0, "keys": keys}] for name, keys in wanted.items()}
    return json.loads(distributed.text_of_first(json.dumps(had | more)))


def counted(
    had: dict[str, list[Change]], stage: ResolvedStage, manifest: Mapping[str, Any] | None
) -> dict[str, list[Change]]:
    """The changes of a run, those of one stage `placed`."""
    entries = list(placed(stage, manifest, had.get(stage.name, ())))
    return {name: e for name, e in {**had, stage.name: entries}.items() if e}


def hint(name: str, differs: Sequence[str]) -> str:
    """What is said of differences of a stage, as `fingerprint.changed` has them, where all of them can be asked for."""
    can = all(text.partition(":")[0] in {f"{name}.{key}" for key in KEYS} for text in differs)
    return ", or ask for it by --change, as --change KEY=VALUE" * can


def record(folder: Path, changes: dict[str, list[Change]]) -> None:
    """Put the changes of a run into its run.json, for who holds its lock."""
    about = folders.about_run(folder)
    if (about.get("changes") or {}) != changes:
        files.write_text(folder / folders.RUN_FILE, sound.signed({**about, "changes": changes}))


def lines(entries: Iterable[Change]) -> list[str]:
    """Each in words."""
    return [
        f"from step {e['step']:,} ({e['nimg']:,} images) on "
        + ", ".join(f"{key} {after} (before: {before})" for key, (before, after) in e["keys"].items())
        for e in entries
    ]


def images(n: int, batch: int, entries: Sequence[Change]) -> int:
    """Images of a stage after n steps. batch: of today."""
    for entry in reversed(entries):
        if n >= entry["step"]:
            return entry["nimg"] + (n - entry["step"]) * batch
        batch = entry["keys"].get("batch", [batch])[0]
    return n * batch
