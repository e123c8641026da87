"""Which rows of a consistency objective a low precision resolves: measured on the network that the stage begins with.

The loss compares f(x_t, t) with f(x_r, r). Each output is rounded to its own size, while their difference shrinks with t - r, so
below some step there is more rounding in the difference than the network is to learn from it. By how much depends on the network
(its depth, its c_out), on the data and on t, so nothing is assumed: at BINS times of equal probability under the objective's own
law, the difference is computed both ways on the same rows, and

    ratio(t) = rms[ (f16(x_t) - f16(x_r)) - (f32(x_t) - f32(x_r)) ] / rms[ f32(x_t) - f32(x_r) ].

At a ratio of 0.1, the limit unless the stage sets another, rounding is 1 % of the squared loss. There also ends the law by
which half the step doubles the ratio: nearer points are often rounded to one number, an error that no mean over rows takes
away. Times beyond the limit are computed in fp32. How many rows of a batch these are differs from step to step, and a step's
shapes must not, for a CUDA graph of it: a batch is sorted, worst ratio first, and its first `wide` rows are computed in fp32,
in quarters of the batch. That is enough for all but one step in millions; there the rows that are left to 16 bits are those
least beyond the limit. A schedule whose steps get smaller (`doublings`) has a count for each of its parts.

Measured once, when a stage begins, and kept in its checkpoints: a run that goes on computes the same rows in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.schema import Ect
from cmt_fast.diffusion import rng
from cmt_fast.objectives.batch import Batch, StageContext
from cmt_fast.objectives.consistency import Drawn, earlier_point, earlier_time, outputs, schedule_stage

BINS = 16
SIGMAS = 6  # of the binomial number of rows beyond the limit, that `wide` leaves room for
SHARES = 4  # parts of a batch that `wide` counts in
KINDS = 4 * (
    SHARES + 1
)  # of calls of the network over all parts of a schedule: each count's two parts, with gradients or not
TOGETHER = 64  # rows of one forward of the measurement

Net = Callable[..., Tensor]


class Part(NamedTuple):
    """One part of the schedule, at BINS times t: t - r, the rms of the difference in fp32, and the ratio."""

    t: list[float]
    span: list[float]
    signal: list[float]
    ratio: list[float]


class Rounding(NamedTuple):
    """What a stage computes in fp32. limit: of the ratio; parts: one for each part of the schedule."""

    limit: float
    parts: list[Part]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Rounding:
        """From what `stored` gave."""
        return cls(stored["limit"], [Part(**part) for part in stored["parts"]])

    def stored(self) -> dict[str, Any]:
        """As JSON types."""
        return {"limit": self.limit, "parts": [part._asdict() for part in self.parts]}

    def beyond(self, k: int) -> float:
        """The share of times that are beyond the limit in part k."""
        return sum(not r <= self.limit for r in self.parts[k].ratio) / BINS

    @property
    def refused(self) -> bool:
        """Whether every time of every part is beyond the limit."""
        return all(self.beyond(k) == 1 for k in range(len(self.parts)))

    def wide(self, k: int, rows: int) -> int:
        """Rows of a batch of `rows` that are computed in fp32 in part k."""
        return wide_rows(self.beyond(k), rows)

    def sorted(self, batch: Batch, random: rng.Random, progress: float) -> tuple[Batch, int]:
        """The rows of a step with those that are to be in fp32 first, and how many these are."""
        k = schedule_stage(progress, len(self.parts) - 1)
        wide = self.wide(k, len(batch.sample))
        if wide in (0, len(batch.sample)):
            return batch, wide
        place = torch.special.ndtr(random.gauss(rng.TIME, batch.sample).double())  # of t among all times, 0 to 1
        ratio = torch.tensor(self.parts[k].ratio, dtype=torch.float64, device=place.device)
        score = ratio[(place * BINS).long().clamp_(0, BINS - 1)].nan_to_num(nan=torch.inf)
        order = torch.argsort(score, descending=True, stable=True)
        return Batch(*(x if x is None else x[order.to(x.device)] for x in batch)), wide


def wide_rows(beyond: float, rows: int) -> int:
    """Rows of a batch of `rows` that are computed in fp32 where this share of times is beyond the limit."""
    most = min(rows, math.ceil(rows * beyond + SIGMAS * math.sqrt(rows * beyond * (1 - beyond))))
    return min(rows, -(-most * SHARES // rows) * -(-rows // SHARES)) if most else 0


def split(narrow: Net, whole: Net, wide: int) -> Net:
    """net(x, t, r, labels, drop, ...) whose first `wide` rows are computed by `whole` and the others by `narrow`."""
    if not wide:
        return narrow

    def net(x: Tensor, *args: Any) -> Tensor:
        if wide == len(x):
            return whole(x, *args)
        first = [a[:wide] if isinstance(a, Tensor) else a for a in args]
        rest = [a[wide:] if isinstance(a, Tensor) else a for a in args]
        y = whole(x[:wide], *first)
        return torch.cat([y, narrow(x[wide:], *rest).to(y.dtype)])

    return net


@torch.no_grad()
def measure(narrow: Net, whole: Net, batch: Batch, random: rng.Random, config: Ect, stage: StageContext) -> list[Part]:
    """The parts of a schedule. narrow, whole: the network in the stage's precision and in fp32; batch: rows of data, each
    looked at under every time with noise of its own.
    """
    n, device = len(batch.sample), batch.x_0.device
    place = (torch.arange(BINS, dtype=torch.float64, device=device) + 0.5) / BINS
    times = torch.exp(config.mean + config.std * torch.special.ndtri(place))
    parts = []
    for k in range(config.doublings + 1):
        r = earlier_time(times, config.q, config.k, config.b, k)
        sums = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        for i in range(BINS):
            for rows in torch.arange(n, device=device).split(TOGETHER):
                own = Batch(*(x if x is None else x[rows.to(x.device)] for x in batch))
                key = random.key(rng.NOISE)
                t, earlier = (x[i].expand(len(rows)).to(own.x_0.dtype) for x in (times, r))
                x_t, eps = stage.path.point(own.x_0, t, key, own.sample + i * n)
                drawn = Drawn(x_t, eps, t, earlier, own.labels, own.drop, None)
                x_r = earlier_point(drawn, config, stage)
                pairs = (outputs(net, drawn, x_r) for net in (narrow, whole))
                low, high = (f.double() - target.double() for f, target in pairs)
                sums[:, i] += torch.stack([(low - high).square().sum(), high.square().sum()])
        noise, signal = (sums / (n * batch.x_0[0].numel())).sqrt()
        ratio = torch.where(noise == 0, 0.0, noise / signal)
        parts.append(Part(times.tolist(), (times - r).tolist(), signal.tolist(), ratio.tolist()))
    return parts
