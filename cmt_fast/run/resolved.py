"""A stage of a run with every name resolved: what its batches are made of, which networks it calls, how long it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import STAGES, Drift, Run, Stage, Trajectories
from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.objectives import OBJECTIVES, counting, taught
from cmt_fast.schedule import Schedule, Since, schedule
from cmt_fast.teacher import solver_error, solver_record
from cmt_fast.teacher.pool import Drawn, Pool, Prior, drawn

INDEX = {name: i for i, name in enumerate(STAGES)}  # enters every random key: never renumber


@dataclasses.dataclass(frozen=True)
class ResolvedStage:
    """A stage of a run with everything that others ask of the pair (run, name), made once by `resolve`.

    config: the stage's own keys; folder: RUN/STAGE, where it lives or will live; changes: of its keys while it was under way, as
    run/changes.py has them.
    """

    run: Run
    name: str
    config: Stage
    folder: Path
    changes: tuple[dict[str, Any], ...] = ()

    @property
    def index(self) -> int:
        """Its place among all stages, which enters every random key."""
        return INDEX[self.name]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.seed

    @property
    def on_nonfinite(self) -> str:
        """What becomes of a step that is not finite: "stop", "skip" or "rollback"; the run's own word where it has none."""
        return self.config.on_nonfinite or self.run.on_nonfinite

    @property
    def nonfinite_limit(self) -> int:
        """Of such steps in a row."""
        return self.config.nonfinite_limit or self.run.nonfinite_limit

    @property
    def path(self) -> ProbabilityPath:
        """The run's path between data and noise."""
        return ProbabilityPath(self.run.path, self.run.sigma_data)

    @property
    def schedule(self) -> Schedule:
        """Its lengths in optimizer steps."""
        counted = [
            change for change in self.changes if "nimg" in change
        ]  # others were asked for, and no step was taken since
        last = counted[-1] if counted else None
        return schedule(self.config, Since(*(last[key] for key in Since._fields)) if last else None)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of a batch on its own objective, and on its anchor."""
        anchor, batch = self.config.anchor, self.config.batch
        anchored = round(anchor.fraction * batch) if anchor else 0
        return batch - anchored, anchored

    @property
    def together(self) -> int:
        """Rows of one class that make a set of its objective, 1 where rows come as they do."""
        o = self.config.objective
        return o.group if isinstance(o, Drift) and o.by_class else 1

    @property
    def trajectory_rows(self) -> int:
        """Rows of a batch that are points of teacher trajectories."""
        own, anchored = self.rows
        return anchored + (own if OBJECTIVES[self.config.objective.kind].draws == "trajectories" else 0)

    @property
    def trajectories(self) -> Trajectories:
        """How its trajectories are made. Raises ConfigError where it names none."""
        if self.config.trajectories is None:
            raise ConfigError(f"{self.name}.trajectories: is missing")
        return self.config.trajectories

    @property
    def guided(self) -> int:
        """Network calls of one guided call of the teacher in its rollouts."""
        t, guide = self.config.trajectories, self.config.autoguidance
        return 1 if t is None or not (t.guided or (guide and guide.trajectories)) else 2

    def forwards(self, solver: str, nfe: int) -> float:
        """Forwards for one student image with trajectories of `nfe` calls, of student and teacher: a backward is two."""
        (own, anchored), batch, t = self.rows, self.config.batch, self.trajectories
        trained = own * counting.work(self.config.objective, self.path, own).forwards + 3 * anchored
        points = drawn(t, self.run.path, nfe // (2 if solver == "heun" else 1))
        return (trained + self.trajectory_rows * self.guided * nfe / points) / batch

    def affords(self, budget: int, setting: solver_error.Solver, nfe: int) -> int:
        """Images, in whole batches, for which `budget` forwards are enough with trajectories of `nfe` calls."""
        return int(budget / self.forwards(setting.solver, nfe)) // self.config.batch * self.config.batch

    @property
    def cache(self) -> str | None:
        """The folder that its trajectories come from, None where it rolls them out or has none."""
        how = self.config.trajectories
        return how.cache if how and self.trajectory_rows else None

    @property
    def called(self) -> dict[str, str]:
        """Key -> name of the networks that must be at hand: not those that only cached trajectories were made by."""
        steps = taught(self.config.objective) or not self.cache
        return {key: name for key, name in self.config.networks().items() if key == "start" or steps}

    def replaced(self, **keys: Any) -> ResolvedStage:
        """The same stage with other values of its own keys."""
        return dataclasses.replace(self, config=dataclasses.replace(cast(Any, self.config), **keys))

    def changed(self, changes: Sequence[dict[str, Any]]) -> ResolvedStage:
        """The same stage, its keys changed so while it was under way."""
        return dataclasses.replace(self, changes=tuple(changes))

    def grad_accum_steps(self, processes: int) -> int:
        """Forwards and backwards of each process in one step. Raises ConfigError where rows do not divide evenly.

        Every pass of every process takes rows of each kind in the whole batch's proportion: only then is the mean over
        parts and processes the mean over the batch.
        """
        stage = self.config
        if stage.batch % processes:
            raise ConfigError(f"{self.name}.batch: {stage.batch} does not divide over {processes} processes")
        each = stage.batch // processes
        micro = stage.micro_batch or each
        if micro < each and each % micro:
            raise ConfigError(f"{self.name}.micro_batch: {micro} does not divide a process's {each} rows a step")
        count = max(1, each // micro)
        shards = processes * count
        own, anchored = self.rows
        where = f"over {count} passes of {processes} processes"
        if own % shards or anchored % shards:
            raise ConfigError(
                f"{self.name}.anchor.fraction: {own} rows of the objective and {anchored} of the anchor do not divide {where}"
            )
        group = getattr(stage.objective, "group", 1)
        if own // shards % group:
            raise ConfigError(
                f"{self.name}.objective.group: {group} rows are a set, and {own} rows {where} are {own // shards} rows a pass, "
                f"which it does not divide; take a batch of a multiple of {group * shards} rows, or other passes (micro_batch)"
            )
        ratio = getattr(stage.objective, "ratio", None)
        if ratio and not round(ratio * own):
            raise ConfigError(
                f"{self.name}.objective.ratio: {ratio} of {own} rows (a batch without its anchor) is none, and no jump would be "
                f"learned; take {1 / own:.2g} or more, or another batch or anchor.fraction"
            )
        if ratio is not None and round(ratio * (own // shards)) * shards != round(ratio * own):
            with_tangents = f"{ratio} of {own} rows are {round(ratio * own)} rows with tangents"
            raise ConfigError(f"{self.name}.objective.ratio: {with_tangents}, which do not divide {where}")
        return count

    def pool(
        self, teacher: Net | None, shape: tuple[int, ...], classes: Drawn, device: torch.device,
        how: Trajectories | None = None, **options: Any,
    ) -> Pool:  # fmt: skip
        """Its trajectories, rolled out as `how` says (default: its own keys); options: as of Pool.

        Raises ValueError where batch and trajectories do not divide.
        """
        how = how or self.trajectories
        rows = self.trajectory_rows
        prior = Prior(shape, classes, self.seed, self.index, self.config.trajectory_dropout)
        return Pool(teacher, self.path, how, prior, rows, device, asked=self.run.asked(self.name), **options)

    def candidates(
        self, nfes: tuple[int, ...] = solver_error.NFE, grids: bool = False
    ) -> list[tuple[solver_error.Solver, int]]:
        """The solvers, each with a number of network calls, whose trajectories fill its batches on these processes."""
        found = []
        for nfe in nfes:
            for setting in solver_error.settings(self.run.path, self.trajectories, grids):
                how = solver_error.apply(self.trajectories, setting, nfe)
                try:
                    self.pool(None, (1,), 0, torch.device("cpu"), how)
                except ValueError:
                    continue
                found.append((setting, nfe))
        return found


def resolve(run: Run, name: str, folder: Path | None = None) -> ResolvedStage:
    """The stage `name` of a run. folder: the run's, none where nothing is read or written. Raises ConfigError."""
    stages = run.stages
    if name not in stages:
        raise ConfigError(f"{name}: is no stage of {run.name}; it has {', '.join(stages)}{nearest(name, stages)}")
    found = ResolvedStage(run, name, stages[name], (folder or Path()) / name)
    t = found.config.trajectories
    return (
        found if t is None or t.budget_forwards is None else budgeted(found, None if folder is None else found.folder)
    )


def budgeted(stage: ResolvedStage, folder: Path | None) -> ResolvedStage:
    """A stage of `trajectories.budget_forwards`, as long as that is: with the solver that was settled in `folder`, before with
    as many calls as `auto` is counted with."""
    t = stage.trajectories
    kept = solver_record.read(folder) if folder and t.nfe == "auto" else None
    own = solver_error.Solver(t.solver, t.order, t.shift)
    images = kept.images if kept else stage.affords(t.budget_forwards or 0, own, t.calls)
    return stage.replaced(images_nimg=max(images or 0, stage.config.batch))
