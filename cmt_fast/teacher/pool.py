"""The pool of points of the teacher's trajectories that feeds mid-training.

A round is `pool_steps` student steps (one in mode "paper"). Its trajectories are rolled out together,
their points shuffled, and each step takes the next rows. Everything is a function of (seed, stage,
round), so a restarted run makes the same pool again and nothing of it is stored. A stage that was rolled back
has other trajectories from there on; of stored ones other points, in another order.

A round's trajectories stand in one buffer on the device, allocated once and written again by every round. It has room for
one round: a second, filled between steps, would even out their times, but teacher and student share one device and the
work would be the same, for twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Trajectories
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import Net
from cmt_fast.diffusion.labels import Some
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import table
from cmt_fast.objectives import meanflow, mid
from cmt_fast.objectives.batch import Kept, Points
from cmt_fast.runtime import distributed, progress
from cmt_fast.teacher.rollouts import Buffer, Rolling

KEEP_BYTES = 1 << 30  # endpoints' features of a round, on one device


class Stock(Protocol):
    """Trajectories that are there already, in the order in which rounds take them."""

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """position: (B,), counted from the start of the stage -> nodes (B, N + 1, ...), labels (B,) or None."""

    def close(self) -> None:
        """End what reads in the background."""


Drawn = int | Some  # labels that are drawn, each as often: 0 to n - 1, or some


class Prior(NamedTuple):
    """What trajectories start from: rows of a shape with labels (classes 0: none), drawn by seed and stage.

    Labels are uniform over the classes that have rows, not in the data's proportions: a class that the teacher never saw has
    no trajectories worth learning, and a rare one is learnt best from the teacher, which has no lack of samples of it.
    dropout: the share of them that starts without a label.
    """

    shape: tuple[int, ...]
    classes: Drawn
    seed: int
    stage: int
    dropout: float = 0.0


class Pool:
    """Points of trajectories from x_T ~ prior with uniformly random labels: no data is read.

    For consistency models a trajectory gives `per_trajectory` of its nodes, evenly spaced from a random first one,
    each with the endpoint; for flow maps as many random pairs i < j of those that are asked about. Fewer points a
    trajectory mean more trajectories, so more starting noises seen. Mode "paper" is the published layout: batch // nfe
    trajectories, all points of each, step-major; of flow maps the pairs are random there too, `per_trajectory` a trajectory.
    """

    def __init__(
        self,
        teacher: Net | None,
        path: ProbabilityPath,
        config: Trajectories,
        prior: Prior,
        rows: int,
        device: torch.device,
        *,
        computing: Callable[[], AbstractContextManager] = nullcontext,
        graph: bool = True,
        asked: str = "any",
    ) -> None:
        """rows: student rows a step over all ranks; computing, graph: as of Rolling; asked: of a flow map's pairs, as of `mid`.

        Many parameters: what is drawn, and with what it is computed.

        `stock` in place of a teacher and `keep`, what endpoints' features are kept for, are set before the first draw.
        Raises ValueError where the numbers do not divide.
        """
        self.teacher, self.path, self.config, self.computing, self.graph = teacher, path, config, computing, graph
        self.shape, self.classes, self.seed, self.stage, self.dropout = prior
        self.rows = rows
        self.device = torch.device(device)
        self.plan = table(path, config.solver, config.nfe, config.t_max, config.t_min, config.order, config.shift)
        self.nodes = len(self.plan.times)
        self.pairs = mid.pairs(self.plan.times, asked).to(self.device) if path.name == "linear" else None
        paper = config.mode == "paper"
        self.steps = 1 if paper else config.pool_steps
        self.each = drawn(config, path.name, self.nodes - 1)
        self.count, rest = divmod(rows * self.steps, self.each)
        if rest or not self.count:
            raise ConfigError(
                f"{rows} rows x {self.steps} steps are not a whole number of trajectories of {self.each} points",
                "batch",
            )
        if self.count % distributed.size():
            raise ConfigError(f"{self.count} trajectories do not divide over {distributed.size()} processes", "batch")
        self.stock: Stock | None = None
        self.keep: tuple[str, Callable[[Tensor], list[Tensor]]] | None = None
        self._round = -1, 0
        self._states, self._times, self._order = (torch.empty(0) for _ in range(3))
        self._labels: Tensor | None = None
        self._guide: Tensor | None = None
        self._kept: Kept | None = None
        self._rolling: Rolling | None = None

    @property
    def teacher_forwards(self) -> float:
        """Teacher forwards a student row (without guidance)."""
        return 0.0 if self.stock else self.plan.nfe / self.each

    def _allocate(self) -> None:
        """The buffer of a round: states (nodes, count, ...), labels (count,), guide (count, 3)."""
        self._states = torch.empty((self.nodes, self.count, *self.shape), device=self.device)
        self._labels = torch.empty(self.count, dtype=torch.int64, device=self.device) if self.classes else None
        self._guide = torch.empty((self.count, 3), device=self.device) if self.config.omega_max != 1 else None
        self._times = torch.tensor(self.plan.times, dtype=self._states.dtype, device=self.device)

    def _fill(self, index: int, redraw: int = 0) -> None:
        """Put the trajectories of round `index` into the buffer: all of the teacher's work, or the stock's, is here."""
        if not len(self._times):
            self._allocate()
        share = self.count // distributed.size()
        mine = slice(share * distributed.rank(), share * (distributed.rank() + 1))
        if self.stock:
            self._take(self.stock, index, mine)
        else:
            self._roll(self._random(index, redraw), mine)
        if distributed.size() > 1:
            for node in self._states:  # one by one: a copy of each is made on the way
                distributed.share_rows(node)
            for own in (self._labels, self._guide):
                if own is not None:
                    distributed.share_rows(own)
        if not torch.isfinite(self._states).all():
            raise FloatingPointError(f"the teacher's trajectories of round {index} are not finite")
        self._keep(mine)
        n, shuffled = self.count * self.each, self.config.mode == "pool"
        random = self._random(index, redraw)
        self._order = (
            random.permutation(rng.SHUFFLE, n, self.device) if shuffled else torch.arange(n, device=self.device)
        )
        self._round = index, redraw

    def _random(self, index: int, redraw: int) -> Random:
        """The numbers of a round."""
        return Random(self.seed, self.stage + rng.REDRAWN * redraw, index)

    def _roll(self, random: Random, mine: slice) -> None:
        """This rank's starts, and the teacher's way from them."""
        ids = torch.arange(mine.start, mine.stop, device=self.device)
        x, labels = starts(random, ids, self.shape, self.classes, self.path, self.config, self.dropout)
        self._states[0, mine] = x
        if self._labels is not None and labels is not None:
            self._labels[mine] = labels
        if self._guide is not None:
            self._guide[mine] = scales(random, ids, self.config)
        if self._rolling is None:
            assert self.teacher is not None
            own = Buffer(self._states, self._labels, self._guide).of(mine)
            self._rolling = Rolling(
                self.teacher, self.path, self.plan, own, self.config.rollout_batch,
                computing=self.computing, graph=self.graph,
            )  # fmt: skip
        self._rolling()

    def _take(self, stock: Stock, index: int, mine: slice) -> None:
        """This rank's trajectories from the stock, whose order goes on from round to round."""
        nodes, labels = stock.rows(torch.arange(mine.start, mine.stop) + index * self.count)
        self._states[:, mine] = nodes.transpose(0, 1)
        if self._labels is not None and labels is not None:
            self._labels[mine] = labels

    def _keep(self, mine: slice) -> None:
        """The endpoints' features, where what is asked for them fits into KEEP_BYTES; else each row's are computed."""
        self._kept = None
        if self.keep is None:
            return
        name, features = self.keep
        ends, parts = self._states[-1], []
        with torch.no_grad():
            for x in ends[mine].split(min(self.rows, mine.stop - mine.start)):
                parts.append(features(x))
                if sum(f[0].nbytes for f in parts[0]) * self.count > KEEP_BYTES:
                    self.keep = None
                    return
        found = [distributed.gather_rows(torch.cat(slices)) for slices in zip(*parts)]
        self._kept = Kept(name, found)

    def draw(self, step: int, rows: Tensor, redraw: int = 0) -> Points:
        """The points of step `step` for global row ids `rows` (n,) in [0, self.rows). drop is None.

        redraw: the number of the draw of noise, as of `BatchProvider.redraw`.
        """
        index, offset = divmod(step, self.steps)
        random = self._random(index, redraw)
        if (index, redraw) != self._round:
            what = "reading trajectories" if self.stock else f"the teacher rolls out {self.count:,} trajectories"
            with progress.phase(what, quiet=True, again=True):
                self._fill(index, redraw)
        slot = self._order[rows + offset * self.rows]
        if self.pairs is not None:
            i, j = self._pair(random, slot, self.pairs)
        else:
            i = self._node(random, slot)
            j = torch.full_like(i, self.nodes - 1)
        trajectory, times = slot % self.count, self._times
        labels = None if self._labels is None else self._labels[trajectory]
        kept = self._kept and Kept(self._kept.distance, [f[trajectory] for f in self._kept.features])
        x, x_r = self._states[i, trajectory], self._states[j, trajectory]
        guide = None if self._guide is None else self._guide[trajectory]
        return Points(x, times[i], x_r, times[j], labels, None, kept=kept, guide=guide)

    def _node(self, random: Random, slot: Tensor) -> Tensor:
        """Every (nodes - 1)/each-th node from a random first; all nodes in order, step-major, when all are drawn."""
        points, i = self.nodes - 1, slot // self.count
        if self.each == points:
            return i
        first = random.integers(rng.PAIR, slot % self.count, points)
        return (first + i * points // self.each) % points

    def _pair(self, random: Random, slot: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform over the nodes' pairs i < j that are asked about (node 0 is noise)."""
        i, j = pairs
        pick = random.integers(rng.PAIR, slot, len(i))
        return i[pick], j[pick]

    def close(self) -> None:
        """End what reads in the background."""
        if self.stock:
            self.stock.close()


def starts(
    random: Random, ids: Tensor, shape: tuple[int, ...], classes: Drawn, path: ProbabilityPath, config: Trajectories,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Where trajectories `ids` (n,) begin: x_T ~ prior (n, *shape), and labels (n,) as of Prior, None without classes."""
    labels = start_labels(random, ids, classes, dropout)
    return random.normal(rng.START, ids, shape) * (config.t_max if path.name == "ve" else 1.0), labels


def start_labels(random: Random, ids: Tensor, classes: Drawn, dropout: float = 0.0) -> Tensor | None:
    """Labels of trajectories `ids` (n,), each class as likely; None without classes.

    A share `dropout` of them is the null class of every network, the number of classes: teacher and student go without both.
    """
    if not classes:
        return None
    if isinstance(classes, Some):
        of = torch.tensor(classes.labels, device=ids.device)
        labels, null = of[random.integers(rng.START_LABEL, ids, len(of))], classes.classes
    else:
        labels, null = random.integers(rng.START_LABEL, ids, classes), classes
    return labels.masked_fill(random.uniform(rng.START_DROP, ids) < dropout, null) if dropout else labels


def scales(random: Random, ids: Tensor, config: Trajectories) -> Tensor | None:
    """Guidance scale and interval (n, 3) of trajectories `ids` (n,), by the law of `imeanflow`; None where all have one scale.

    Every other trajectory has the whole interval, as there half of the rows have.
    """
    if config.omega_max == 1:
        return None
    streams = (rng.START_GUIDANCE, rng.START_GUIDANCE_LOW, rng.START_GUIDANCE_HIGH)
    return meanflow.guides([random.uniform(s, ids) for s in streams], ids % 2 == 0, config)


def roller(
    teacher: Net,
    path: ProbabilityPath,
    config: Trajectories,
    prior: Prior,
    device: torch.device,
    rows: int,
    computing: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
    """roll(first, count <= rows) -> nodes (N + 1, count, *shape), labels: trajectories first, first + 1, ... of round 0.

    What it returns is good until the next call.
    """
    shape, classes, seed, stage, dropout = prior
    plan = table(path, config.solver, config.nfe, config.t_max, config.t_min, config.order, config.shift)
    nodes = torch.empty((len(plan.times), rows, *shape), device=device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device) if classes else None
    guide = torch.empty((rows, 3), device=device) if config.omega_max != 1 else None
    rolling = Rolling(teacher, path, plan, Buffer(nodes, labels, guide), config.rollout_batch, computing=computing)

    def roll(first: int, count: int) -> tuple[Tensor, Tensor | None]:
        ids = torch.arange(rows, device=device) + first  # a short last part is rolled out whole: one shape, one graph
        x, ys = starts(Random(seed, stage, 0), ids, shape, classes, path, config, dropout)
        nodes[0] = x
        if labels is not None and ys is not None:
            labels.copy_(ys)
        if guide is not None:
            guide.copy_(scales(Random(seed, stage, 0), ids, config))
        rolling()
        return nodes[:, :count], None if labels is None else labels[:count]

    return roll


def drawn(config: Trajectories, path: str, points: int) -> int:
    """Points or pairs drawn from each trajectory of `points` steps."""
    if path == "linear":
        return config.per_trajectory
    return points if config.mode == "paper" else min(config.per_trajectory, points)
