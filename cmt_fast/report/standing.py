"""What a report knows of a run: how far each stage has come, and how its network was judged."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.schema import Stage
from cmt_fast.storage import checkpoint
from cmt_fast.usage.ledger import Usage

Curve = list[tuple[int, float]]  # (student images, Fréchet distance)


class Stand(NamedTuple):
    """How far a stage has come. manifest: of its newest sound checkpoint; state: one phrase for the reader.

    bill: None where nobody counted.
    """

    name: str
    stage: Stage
    rows: list[dict[str, Any]]
    manifest: dict[str, Any] | None
    done: bool
    state: str
    grids: list[Path]
    bill: Usage | None = None

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
        names, nimg, node = [], 0, self.manifest
        while node:
            names.insert(0, node["stage"])
            nimg += node["nimg"] if node["stage"] != "pre" else 0
            node = node.get("parent")
        return " → ".join(names), nimg

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """Its rows of one kind in metrics.jsonl."""
        return [row for row in self.rows if row["kind"] == kind]


def finished_at(found: checkpoint.Checkpoint) -> datetime.datetime:
    """When a checkpoint was written, by the run's own clock; of one without, by its file, whose time a copy makes anew."""
    until = (found.manifest.get("bill") or {}).get("until")
    moment = until or (found.folder / "manifest.json").stat().st_mtime
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)


class Judged(NamedTuple):
    """Figures of one network by number of steps, as a few-step generator and by the solver; None: not finite.

    Figures are those of evaluation/measures.py but `left_out`. during: those by the solver on as many samples as are judged in
    training, to be drawn beside those curves. left_out: {"few": {steps: {distance: [...]}}, "solver": ...}, of which intervals
    are made.
    """

    few: dict[str, dict[str, float] | None]
    solver: dict[str, dict[str, float] | None]
    during: dict[str, dict[str, float] | None]
    left_out: dict[str, dict[str, dict[str, list[float]]]] = {}

    def figures(self, steps: int | str, how: str = "few") -> dict[str, Any] | None:
        """Those of so many steps with `left_out`; None where they are not finite or nobody judged them."""
        found = getattr(self, how).get(str(steps))
        return {**found, "left_out": self.left_out.get(how, {}).get(str(steps), {})} if found else None


class Names(NamedTuple):
    """What the report calls the judge: its first feature space, its second, and the distance (Fréchet, FID, FD-DINOv2)."""

    first: str
    second: str
    distance: str
