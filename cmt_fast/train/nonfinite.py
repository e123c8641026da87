"""The way on from a step whose loss, gradient or tangent is not finite.

The device decides: such a loss makes its gradient NaN (engine/graph.py), gradients are summed over ranks, and a sum that is not
finite changes nothing on any of them (adamw_ema, DeepSpeed's own check under ZeRO). On a GPU nobody waits to know: later steps
change nothing either, and the host sees it at the next look for a signal, row or save. The state is then what it was before
that step, on all ranks, to the bit: so the step can be traced layer by layer where it stands, and the steps after it are taken
again. Every number of a step is a function of (seed, stage, step): it makes no difference to them that they were tried before.

    STAGE/nonfinite/step-00000012.json   what is known of such a step: rows, seeds, the first layer, what was decided
    STAGE/nonfinite/rollbacks.json       {"rollbacks": [{"step", "from", "redraw"}, ...]}: from which step on noise and times are
                                         drawn anew; manifests have those of before, which count where the file is damaged

`on_nonfinite: stop` ends the run, `skip` goes on without the step, and `rollback` from the newest checkpoint with other noise.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_fast.engine import Engine
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, exits
from cmt_fast.runtime.progress import say
from cmt_fast.storage import checkpoint, files, sound
from cmt_fast.train import checks, tracing
from cmt_fast.train.batches import BatchProvider

FOLDER, ROLLBACKS = "nonfinite", "rollbacks.json"
KEPT = 20  # dumps of a stage: a run that skips for weeks does not fill a disk


class NotFinite(FloatingPointError):
    """A step that ends the run, told in one line; on all ranks."""

    code = exits.NOT_FINITE


class RollBack(Exception):
    """Ask for the stage to be gone on with from its newest checkpoint, with other noise; on all ranks."""

    def __init__(self, stage: ResolvedStage, step: int, text: str) -> None:
        super().__init__(text)
        self.stage, self.step = stage, step


class Guard:
    """Of one stage's steps. Every rank makes every call, `saw` and `told` aside.

    missing: steps since the last row of metrics that were none.
    """

    def __init__(
        self, stage: ResolvedStage, engine: Engine, source: BatchProvider, found: checkpoint.Checkpoint | None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """ready: is called, on all ranks, before a step is traced: memory is made room in, and what is being saved is on disk."""
        self.stage, self.engine, self.source, self.ready = stage, engine, source, ready
        self.skipped = skipped(found)
        row = found.manifest.get("row") if found else None
        self.missing = int((row or {}).get("missing", 0))
        engine.skipped = len(self.skipped)
        self.rollbacks = known_rollbacks(stage.folder, found, aside=True)
        source.redraws = [(r["from"], r["redraw"]) for r in self.rollbacks]
        # where the host waits for the device at every step anyway it looks at once
        self.at_once = engine.device.type == "cpu" or not hasattr(engine, "stuck") or bool(engine.scaling())
        self.checks = checks.Record(stage.folder, distributed.rank() == 0, checks.layout(stage, engine))
        self._first = torch.full((), -1, dtype=torch.int64, device=engine.device)
        self._loss: Tensor | None = None

    def take(self, step: int, one: Callable[[int], float], row: bool, look: bool) -> float:
        """Take a step by `one`, which is given its number and returns its learning rate; where the host looks, do what is asked
        for steps that were not finite since. row: its checksums are recorded.

        Raises NotFinite or RollBack, with the state of before the step that was not finite.
        """
        self.engine.checking = row
        lr = one(step)
        if not (look or self.at_once):
            return lr
        while (bad := int(self._first)) >= 0:
            self._decide(bad)
            for again in range(bad + 1, step + 1):
                lr = one(again)
        if row and self.engine.checks and self._loss is not None and step + 1 not in self.skipped:
            loss = float(distributed.mean_(self._loss.double().clone()))
            of = {key: int(total) for key, total in self.engine.checks.items()}
            history = checks.history(self.stage.changes, self.rollbacks, step + 1)
            self.checks.add(step + 1, loss, of, distributed.size(), history)
        self.engine.checking, self.engine.checks = False, {}
        return lr

    def saw(self, step: int, losses: list[Tensor], norm: Tensor) -> Tensor:
        """What step `step` gave: the loss of each part on this rank, the gradient's norm. Returns whether it counts, ()."""
        self._loss = torch.stack(losses).mean()
        sound = ~norm.isnan()
        self._first = torch.where(sound | (self._first >= 0), self._first, step)
        return sound

    def told(self) -> dict[str, int]:
        """What a row of metrics says; nothing where nothing was skipped."""
        return {"nonfinite_steps": len(self.skipped)} if self.skipped else {}

    def stored(self) -> dict[str, Any]:
        """What a manifest keeps, {} where nothing happened."""
        kept = {"skipped": self.skipped, "rollbacks": self.rollbacks}
        return {"nonfinite": {k: list(v) for k, v in kept.items() if v}} if any(kept.values()) else {}

    @property
    def undecided(self) -> bool:
        """Whether a step was not finite that the host has not looked at: the state is of before it. Waits for the device."""
        return int(self._first) >= 0

    @property
    def row(self) -> int:
        """Steps that are missing in the row that ends now; the next one begins."""
        count, self.missing = self.missing, 0
        return count

    def _decide(self, bad: int) -> None:
        """Dump what is known of step `bad`, and skip it, unless the run stops or rolls back."""
        do, limit, name = self.stage.on_nonfinite, self.stage.nonfinite_limit, self.stage.name
        in_a_row = 1
        while bad + 1 - in_a_row in self.skipped:
            in_a_row += 1
        over = do == "skip" and in_a_row > limit
        self.ready()
        where, place = self._dump(bad, "stop" if over else do)
        text = f"{name}: step {bad + 1:,} is not finite: {where}"
        if do == "rollback":
            raise RollBack(self.stage, bad + 1, text)
        if do == "stop" or over:
            why = f"; {limit} steps before it were skipped (nonfinite_limit)" if over else ""
            raise NotFinite(f"{text}{why}; {self._way_on(place, bad)}")
        if distributed.rank() == 0:
            say(f"{text}; skipped, {len(self.skipped) + 1} in all")
        self.engine.skip(bad + 1)
        self.skipped.append(bad + 1)
        self.missing += 1
        self._first = torch.full_like(self._first, -1)

    def _way_on(self, place: Path, bad: int) -> str:
        at = [n for n in checkpoint.steps(self.stage.folder) if n <= bad] if distributed.rank() == 0 else []
        kept = f"the checkpoint of step {at[-1]:,} is from before it" if at else "the stage has no checkpoint yet"
        kept = distributed.text_of_first(kept)  # others may see its files late
        other = "; or take precision bf16, tf32 or fp32" if self.stage.config.precision == "fp16" else ""
        return (
            f"{kept}, and what is known is in {place}. The same settings would fail again: look by `cmt replay "
            f"{self.stage.folder} --step {bad + 1}`, go on with on_nonfinite=skip or on_nonfinite=rollback{other}"
        )

    def _dump(self, bad: int, decided: str) -> tuple[str, Path]:
        """Trace the step where it stands and write what is known. Returns it in words, and where it was written."""
        count, source, engine = self.engine.step_count, self.source, self.engine
        found = tracing.traced(
            engine, lambda probe: lambda drawn: source.loss_of(probe, drawn), source.held,
            lambda part: source.draw(bad, part),
        )  # fmt: skip
        engine.step_count = count
        mine = {"rank": distributed.rank(), **found._asdict(), "loss": repr(found.loss), "rows": self._rows(bad)}
        ranks = [json.loads(text) for text in tracing.texts_of_all(json.dumps(mine))]
        place = self.stage.folder / FOLDER / f"step-{bad + 1:08d}.json"
        words = told(ranks)
        if distributed.rank() == 0:
            stage = self.stage
            about = {
                "stage": stage.name, "step": bad + 1, "nimg": stage.schedule.nimg(bad), "seed": stage.seed,
                "index": stage.index, "redraw": source.redraw(bad), "where": words, "decided": decided,
                "engine": stage.run.engine, "precision": stage.config.precision, "ranks": ranks,
                "checkpoints": checkpoint.steps(stage.folder), "time": time.time(),
            }  # fmt: skip
            with contextlib.suppress(OSError):  # a full disk has its own end, and this is no time for another
                _keep(place, about)
        return words, place

    def _rows(self, bad: int) -> dict[str, Any]:
        """Which rows this rank took: their numbers in the batch, and those of the data set where they come from one."""
        mine = [self.source.mine(part) for part in range(self.engine.grad_accum_steps)]
        rows: dict[str, Any] = {"batch": torch.cat(mine).tolist()}
        if self.source.loader is not None:
            loader = self.source.loader
            index, epoch = loader.order(self.source.places(bad, torch.cat(mine).to(loader.place)))
            rows |= {"data": index.tolist(), "epoch": epoch.tolist()}
        return rows


def told(ranks: list[dict[str, Any]]) -> str:
    """Where it begins, in words, from what each rank found of its own rows."""
    for kind, text in (("forward", "begins at {}"), ("backward", "begins in the backward pass at {}")):
        bad = [r for r in ranks if r[kind]]
        if bad:
            of = f" on rank {', '.join(str(r['rank']) for r in bad)}" if len(ranks) > 1 else ""
            return text.format(bad[0][kind]) + of
    return "the same rows are finite when they are computed once more: memory, a device or a kernel may be at fault"


def _keep(place: Path, about: Mapping[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(place, sound.signed(about) + "\n")
    for old in sorted(place.parent.glob("step-*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)


def skipped(found: checkpoint.Checkpoint | None) -> list[int]:
    """The steps, from 1, that a stage had skipped at a checkpoint."""
    return list((found and found.manifest.get("nonfinite") or {}).get("skipped", ()))


def rollbacks(folder: Path, manifest: Mapping[str, Any] | None, aside: bool = False) -> list[dict[str, int]]:
    """The rollbacks of a stage, oldest first; those of the checkpoint that is gone on from where the file is damaged, or older:
    what came after it will come again. aside: put a damaged file aside."""
    path, known = folder / FOLDER / ROLLBACKS, list(((manifest or {}).get("nonfinite") or {}).get("rollbacks", ()))
    with contextlib.suppress(FileNotFoundError):
        try:
            found = checked(path)
            return found if found[: len(known)] == known else known
        except sound.Unsound as error:
            if aside:
                sound.aside(path, f"{error.why}, those that the checkpoint knows count")
    return known


def checked(path: Path) -> list[dict[str, int]]:
    """What rollbacks.json says. Raises FileNotFoundError, Unsound."""
    found = sound.read(path, signs=True)
    sound.placed(path, found, path.parents[1])
    try:
        return [{key: int(entry[key]) for key in ("step", "from", "redraw")} for entry in found["rollbacks"]]
    except (KeyError, TypeError, ValueError):
        raise sound.Unsound(path, "holds no rollbacks") from None


def dump(folder: Path, step: int) -> dict[str, Any] | None:
    """What a stage wrote of a step that was not finite; None where it wrote nothing, or that is not what was written."""
    with contextlib.suppress(OSError, sound.Unsound):
        return dumped(folder / FOLDER / f"step-{step:08d}.json")
    return None


def dumped(path: Path) -> dict[str, Any]:
    """The same. Raises FileNotFoundError, Unsound."""
    found = sound.read(path)
    sound.placed(path, found, path.parents[1])
    if path.stem != f"step-{found.get('step', 0):08d}":
        raise sound.Unsound(path, f"is of step {found.get('step')}, it was renamed or copied")
    return found


def known_rollbacks(folder: Path, found: checkpoint.Checkpoint | None, aside: bool = False) -> list[dict[str, int]]:
    """`rollbacks` as the first rank reads them, on every rank: others may see a file late, and would draw other noise."""
    manifest = found and found.manifest
    return json.loads(distributed.from_first(lambda: json.dumps(rollbacks(folder, manifest, aside)).encode()))


def roll_back(work: Workspace, asked: RollBack) -> None:
    """Record that a stage goes on from its newest checkpoint with other noise. Raises NotFinite, on all ranks, where that was
    tried from there as often as the run allows, or there is nothing to go back to. The first rank decides."""
    stage = asked.stage
    entries = json.loads(distributed.from_first(lambda: json.dumps(_with_one_more(asked)).encode(), NotFinite))

    def write() -> None:
        if distributed.rank() == 0:
            at, draw = entries[-1]["from"], entries[-1]["redraw"]
            _write(stage.folder / FOLDER / ROLLBACKS, entries)
            say(f"{asked}; back to step {at:,}, with other noise from there on (draw {draw})")

    distributed.agreed(write)
    distributed.barrier()


def _with_one_more(asked: RollBack) -> list[dict[str, int]]:
    """The rollbacks of a stage with the one that is asked for. Raises NotFinite."""
    stage = asked.stage
    try:
        found = checkpoint.newest(stage.folder)
        before = rollbacks(stage.folder, found and found.manifest)
    except checkpoint.CheckpointError as error:
        raise NotFinite(f"{asked}; there is nothing to go back to: {error}") from None
    at = found.manifest["step"] if found else 0
    tries = sum(entry["from"] == at for entry in before)
    if tries >= stage.nonfinite_limit:
        raise NotFinite(f"{asked}; {tries} draws of noise from step {at:,} on failed too (nonfinite_limit)")
    return [*before, {"step": asked.step, "from": at, "redraw": 1 + max((e["redraw"] for e in before), default=0)}]


def _write(path: Path, entries: list[dict[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, sound.signed({"stage": path.parents[1].name, "rollbacks": entries}) + "\n")
    files.sync(path.parent)  # before a step is taken by it
