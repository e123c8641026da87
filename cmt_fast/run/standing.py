"""Where the stages of a run stand, and whether it lives, from the small files that it keeps: no torch, no data, no network.

RUN/run.json           the stages and their lengths          STAGE/metrics.jsonl    images seen, loss, evaluations
RUN/heartbeat          when it last did something            STAGE/bill.alive       when its process last lived
STAGE/checkpoints/     what is finished                      STAGE/bill.json        what was used

One answer for the report, `cmt runs` and `cmt watch`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

from cmt_fast.config.schema import Run, Stage
from cmt_fast.runtime import words
from cmt_fast.storage import checkpoint, metrics_log, sound
from cmt_fast.storage.heartbeat import DEAD_S, HEARTBEAT, QUIET_S
from cmt_fast.storage.record import Record
from cmt_fast.usage import bills
from cmt_fast.usage.bills import Usage

SOLVER = "solver.json"  # of teacher/solver_record.py, which needs torch
PULSE_S = 60.0  # after which a process that writes bill.alive every 5 s is gone
AHEAD_S = 60.0  # by which clocks of two machines may differ


class Standing(NamedTuple):
    """How far a stage is. folder: where it is, own: in this run, not in the one that it was taken from; record: its
    metrics.jsonl, None where it was not read; manifest: of its newest sound checkpoint; wrong: what is wrong with a newer one;
    bill: None where nobody counted; spoilt: which of its other files are damaged.
    """

    name: str
    stage: Stage
    folder: Path
    own: bool = True
    record: Record | None = None
    manifest: dict[str, Any] | None = None
    wrong: str = ""
    bill: Usage | None = None
    spoilt: str = ""

    @property
    def done(self) -> bool:
        """Whether its last checkpoint is its end."""
        return bool(self.manifest and self.manifest.get("done"))

    @property
    def nimg(self) -> int:
        """Images that it has seen, those since its newest checkpoint too."""
        return max(self.record.last_nimg if self.record else 0, self.manifest["nimg"] if self.manifest else 0)

    def images(self, step: int) -> int:
        """Images after so many steps, whatever its batch was meanwhile."""
        entries = (self.manifest or {}).get("changes")
        if not entries:
            return step * self.stage.batch
        from cmt_fast.run import changes  # it needs torch, which looking at a run does not

        return changes.images(step, self.stage.batch, entries)

    @property
    def share(self) -> float:
        """What of it is trained, 0 to 1."""
        return 1.0 if self.done else min(1.0, self.nimg / max(1, self.stage.images_nimg))

    @property
    def state(self) -> str:
        """`finished`, `40%` or `not begun`, and what is damaged."""
        text = "finished" if self.done else f"{self.share:.0%}" if self.nimg else "not begun"
        if self.wrong and not self.manifest:
            return f"damaged: {self.wrong}"
        return "; damaged: ".join(filter(None, (text, self.wrong, self.spoilt)))

    @property
    def told(self) -> str:
        """The same for a page, with images and the time."""
        whole = f"{self.stage.images_nimg:,} images"
        if self.manifest is None and self.wrong:
            return f"damaged: none of its checkpoints is whole ({self.wrong})"
        if self.manifest is None:
            return f"begun: {self.nimg:,} of {whole}, no checkpoint yet" if self.record else "not trained"
        if not self.done:
            text = f"unfinished: {self.manifest['nimg']:,} of {whole}"
        else:
            text = f"finished {datetime.datetime.fromtimestamp(self.saved, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
        return "; damaged: ".join(filter(None, (text, self.wrong, self.spoilt)))

    @property
    def saved(self) -> float:
        """When its newest sound checkpoint was written, Unix time; 0 without one."""
        return moment(checkpoint.folder_of(self.folder, self.manifest["step"]), self.manifest) if self.manifest else 0.0

    @property
    def ema(self) -> str:
        """Checksum of the EMA weights, empty without a checkpoint."""
        return checkpoint.ema_sum(self.manifest) if self.manifest else ""

    @property
    def objective(self) -> str:
        """What it trains on, the anchor too."""
        return self.stage.objective.kind + (f" + {self.stage.anchor.objective.kind}" if self.stage.anchor else "")

    @property
    def path(self) -> tuple[str, int]:
        """The stages behind its weights as `pre → mid → post`, and the images of those after pre-training."""
        names, nimg, node = list[str](), 0, self.manifest
        while node:
            names.insert(0, node["stage"])
            nimg += node["nimg"] if node["stage"] != "pre" else 0
            node = node.get("parent")
        return " → ".join(names), nimg

    @property
    def grids(self) -> list[Path]:
        """Its pictures in training, the newest last."""
        return sorted(p for p in (self.folder / "grids").glob("*.png") if p.stem.isdigit())

    @property
    def hours(self) -> dict[str, float]:
        """Device-hours that it took, by unit (gpu, core)."""
        return {unit: self.bill.total(unit).hours for unit in self.bill.amounts} if self.bill else {}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Its rows of evaluations in training."""
        return self.record.kind("eval") if self.record else []


def moment(folder: Path, manifest: dict[str, Any]) -> float:
    """When a checkpoint was written, Unix time by the run's own clock; of one without, by its file, which a copy makes anew."""
    return (manifest.get("bill") or {}).get("until") or written(folder / "manifest.json")


def place(folder: Path, parents: Path | None, name: str) -> Path:
    """Where a stage is: in the run, or where its parents are while it has begun there and not here."""

    def begun(stage: Path) -> bool:
        try:
            return (stage / metrics_log.METRICS).is_file() or bool(checkpoint.steps(stage))
        except (OSError, checkpoint.CheckpointError):
            return True  # what is there cannot be seen

    own = folder / name
    return parents / name if parents and not begun(own) and begun(parents / name) else own


def of(
    run: Run, folder: Path, parents: Path | None, name: str, record: Callable[[Path], Record] = Record.of,
    sound: Callable[[Path], checkpoint.Checkpoint] = checkpoint.sized,
) -> Standing:  # fmt: skip
    """One stage. record: reads metrics.jsonl; sound: reads a checkpoint, CheckpointError for one that is passed over."""
    home = place(folder, parents, name)
    manifest, wrong = None, ""
    try:
        steps = checkpoint.steps(home)
        wrong = next((f"{path.name} was renamed" for path in checkpoint.strays(home)), "")
    except checkpoint.CheckpointError as error:
        steps, wrong = [], str(error)
    for step in reversed(steps):
        try:
            manifest = sound(checkpoint.folder_of(home, step)).manifest
            break
        except checkpoint.CheckpointError as error:
            wrong = wrong or str(error).removeprefix(f"{home / 'checkpoints'}/")
    found = record(home / metrics_log.METRICS)
    bill = bills.of_stage(home, manifest)
    spoilt = _spoilt(home, found, manifest)
    return Standing(
        name, _as_long(run.stages[name], home), home, home.parent == folder, found, manifest, wrong, bill, spoilt
    )


def _as_long(stage: Stage, home: Path) -> Stage:
    """A stage of `trajectories.budget_forwards` with the images that were settled when it began, before as the recipe has it."""
    if stage.trajectories is None or stage.trajectories.budget_forwards is None:
        return stage
    try:
        worth = sound.read(home / SOLVER).get("worth")
    except (OSError, sound.Unsound):
        return stage
    images = worth.get("images") if isinstance(worth, dict) else None
    return (
        dataclasses.replace(cast(Any, stage), images_nimg=images) if isinstance(images, int) and images > 0 else stage
    )


def _spoilt(home: Path, record: Record, manifest: dict[str, Any] | None) -> str:
    """Which files of a stage, beside its checkpoints, are not what was written."""
    out = [f"{record.lost} row{'s' * (record.lost > 1)} of metrics.jsonl"] if record.lost else []
    if metrics_log.wrong(home / metrics_log.METRICS):
        out.append(metrics_log.METRICS)
    elif missing := metrics_log.lacking(record.whole, manifest):
        out.append(f"{metrics_log.METRICS} ({missing})")
    for name in (bills.FILE, "figures.json", "guidance.json", SOLVER):
        try:
            bills.checked(home) if name == bills.FILE else sound.read(home / name)
        except sound.Unsound:
            out.append(name)
        except OSError:
            continue
    return ", ".join(out)


class Life(NamedTuple):
    """Whether a run lives. word: `new`, `alive`, `quiet`, `lost`, `hangs`, `stopped`, `ahead`, `finished`; text: one phrase;
    age_s: of the last sign.
    """

    word: str
    text: str
    age_s: float


def life(folder: Path, stages: Iterable[Standing], now: float) -> Life:
    """By the beat of what it does and the pulse of its processes. now: Unix time."""
    stages = list(stages)
    if all(s.done for s in stages):
        age = now - max(s.saved for s in stages)
        return Life("finished", f"finished {words.about(age)} ago", age)
    beat = written(folder / HEARTBEAT)
    if not beat:
        return Life("new", "has not been alive yet", 0.0)
    age = now - beat
    pulses = [written(s.folder / bills.ALIVE) for s in stages if s.own and not s.done]
    ahead = max(beat, *pulses, 0.0) - now
    if ahead > AHEAD_S:
        return Life("ahead", f"its last sign of life is {words.about(ahead)} ahead of this clock", -ahead)
    pulse = now - max(pulses) if any(pulses) else None
    if pulse is not None and pulse < PULSE_S:
        if age < DEAD_S:
            return Life("alive", f"alive {words.about(min(age, pulse))} ago", min(age, pulse))
        return Life("hangs", f"its process lives, but has done nothing for {words.about(age)}", age)
    if age < QUIET_S:
        return Life("alive", f"alive {words.about(age)} ago", age)
    if pulse is None:
        return Life("stopped", f"stopped {words.about(age)} ago; the same `cmt train` goes on", age)
    text = f"no sign of life for {words.about(age)}"
    return Life("lost", f"{text}: `cmt doctor --heartbeat {folder}`", age) if age > DEAD_S else Life("quiet", text, age)


def written(path: Path) -> float:
    """When a file was last written, Unix time; 0 where it is not."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
