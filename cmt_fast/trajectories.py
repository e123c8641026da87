"""Teacher rollouts in bulk, and the pool of their points that feeds mid-training.

A round is `pool_steps` student steps (one in mode "paper"). Its trajectories are rolled out together,
their points shuffled, and each step takes the next rows. Everything is a function of (seed, stage,
round), so a restarted run makes the same pool again and nothing of it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast import distributed, rng
from cmt_fast.objectives.batch import Points
from cmt_fast.paths import Path
from cmt_fast.rng import Random
from cmt_fast.schema import Trajectories
from cmt_fast.solvers import Net, rollout, table


class Pool:
    """Points of trajectories from x_T ~ prior with uniformly random labels: no data is read.

    For consistency models a trajectory gives `per_trajectory` of its nodes, evenly spaced from a random first one,
    each with the endpoint; for flow maps as many random pairs i < j of its nodes. Fewer points a trajectory mean more
    trajectories, so more starting noises seen. Mode "paper" is the published layout: batch // nfe trajectories, all
    points of each, step-major.
    """

    def __init__(
        self,
        teacher: Net,
        path: Path,
        config: Trajectories,
        shape: tuple[int, ...],
        classes: int,
        rows: int,
        seed: int,
        stage: int,
        device: torch.device,
    ) -> None:
        """rows: student rows a step over all ranks. Raises ValueError where the numbers do not divide."""
        self.teacher, self.path, self.config = teacher, path, config
        self.shape, self.classes, self.rows, self.seed, self.stage, self.device = (
            shape,
            classes,
            rows,
            seed,
            stage,
            device,
        )
        self.plan = table(path, config.solver, config.nfe, config.t_max, config.t_min, config.order, config.shift)
        self.nodes = len(self.plan.times)
        self.pairs = path.name == "linear"
        paper = config.mode == "paper"
        self.steps = 1 if paper else config.pool_steps
        self.each = drawn(config, path.name, self.nodes - 1)
        self.count, rest = divmod(rows * self.steps, self.each)
        if rest or not self.count:
            raise ValueError(
                f"batch: {rows} rows x {self.steps} steps are not a whole number of trajectories of {self.each} points"
            )
        if self.count % distributed.size():
            raise ValueError(f"batch: {self.count} trajectories do not divide over {distributed.size()} processes")
        self._round = -1
        self._states = torch.empty(0)
        self._labels: Tensor | None = None
        self._order = torch.empty(0)

    @property
    def teacher_forwards(self) -> float:
        """Teacher forwards a student row (without guidance)."""
        return self.plan.nfe / self.each

    def _fill(self, index: int) -> None:
        random = Random(self.seed, self.stage, index)
        share = self.count // distributed.size()
        mine = torch.arange(share, device=self.device) + share * distributed.rank()
        labels = random.integers(rng.START_LABEL, mine, self.classes) if self.classes else None
        scale = self.config.t_max if self.path.name == "ve" else 1.0
        x = random.normal(rng.START, mine, self.shape) * scale
        parts = [
            rollout(self.teacher, self.path, self.plan, xs, ls)
            for xs, ls in zip(x.split(self.config.rollout_batch), _split(labels, self.config.rollout_batch, share))
        ]
        self._states = distributed.gather_rows(torch.cat(parts, dim=1), dim=1)  # (nodes, count, ...)
        self._labels = None if labels is None else distributed.gather_rows(labels)
        n = self.count * self.each
        shuffled = self.config.mode == "pool"
        self._order = (
            random.permutation(rng.SHUFFLE, n, self.device) if shuffled else torch.arange(n, device=self.device)
        )
        if not torch.isfinite(self._states).all():
            raise FloatingPointError(f"the teacher's trajectories of round {index} are not finite")
        self._round = index

    def draw(self, step: int, rows: Tensor) -> Points:
        """The points of step `step` for global row ids `rows` (n,) in [0, self.rows). drop is None."""
        index, offset = divmod(step, self.steps)
        if index != self._round:
            self._fill(index)
        slot = self._order[rows + offset * self.rows]
        if self.pairs:
            i, j = self._pair(index, slot)
        else:
            i = self._node(index, slot)
            j = torch.full_like(i, self.nodes - 1)
        trajectory = slot % self.count
        times = torch.tensor(self.plan.times, dtype=self._states.dtype, device=self.device)
        labels = None if self._labels is None else self._labels[trajectory]
        return Points(self._states[i, trajectory], times[i], self._states[j, trajectory], times[j], labels, None)

    def _node(self, index: int, slot: Tensor) -> Tensor:
        """Every (nodes - 1)/each-th node from a random first; all nodes in order, step-major, when all are drawn."""
        points, i = self.nodes - 1, slot // self.count
        if self.each == points:
            return i
        first = Random(self.seed, self.stage, index).integers(rng.PAIR, slot % self.count, points)
        return (first + i * points // self.each) % points

    def _pair(self, index: int, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform over the nodes' pairs i < j (node 0 is noise)."""
        i, j = torch.triu_indices(self.nodes, self.nodes, offset=1, device=self.device)
        pick = Random(self.seed, self.stage, index).integers(rng.PAIR, slot, len(i))
        return i[pick], j[pick]


def drawn(config: Trajectories, path: str, points: int) -> int:
    """Points or pairs drawn from each trajectory of `points` steps."""
    if path == "linear":
        return config.per_trajectory
    return points if config.mode == "paper" else min(config.per_trajectory, points)


def _split(labels: Tensor | None, size: int, n: int) -> list[Tensor | None]:
    return [None] * -(-n // size) if labels is None else list(labels.split(size))
