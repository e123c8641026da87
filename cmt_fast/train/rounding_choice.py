"""Which rows of a stage in bf16 or fp16 are computed in fp32: measured when it begins, then kept (objectives/rounding.py)."""

from __future__ import annotations

import functools

import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Ect, Stage
from cmt_fast.diffusion import rng
from cmt_fast.engine import Engine
from cmt_fast.objectives import Batch, rounding
from cmt_fast.objectives.rounding import Part, Rounding
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint
from cmt_fast.train.batches import BatchProvider

ROWS = 32  # of data, each at every time


@progress.phase("measuring what the precision resolves", quiet=True)
def settle(
    resolved: ResolvedStage, engine: Engine, source: BatchProvider, found: checkpoint.Checkpoint | None
) -> Rounding | None:
    """What the stage resolves; None where it compares no two outputs of its network or is in fp32. Every rank must call it.

    found: the checkpoint that the stage goes on from; one that says nothing is of a version that did not measure. Raises
    ConfigError where the precision resolves no time of the stage.
    """
    stage, name = resolved.config, resolved.name
    if not isinstance(stage.objective, Ect) or not stage.half:
        return None
    if found:
        kept = found.manifest.get("rounding")
        return Rounding.of(kept) if kept else None
    of_all = lambda part: Part(*(distributed.every_rank(values)[0] for values in part))  # as rank 0 measured it
    whole = functools.partial(engine.eager, wide=True)  # no other kind of call is compiled for it
    parts = rounding.measure(
        engine.eager, whole, _rows(source), rng.Random(source.seed, source.index, 0), stage.objective,
        source.context,
    )  # fmt: skip
    out = Rounding(stage.rounding_limit, [of_all(part) for part in parts])
    if out.refused:
        raise ConfigError(_why(stage, out), f"{name}.precision")
    if distributed.rank() == 0:
        for line in lines(stage, out, len(source.mine(0))):
            progress.say(f"{name:>8} {line}")
    return out


def _rows(source: BatchProvider) -> Batch:
    """The first rows of the data, none without its label; a smaller data set has fewer."""
    index = torch.arange(min(ROWS, source.data.n))
    x_0, labels = (
        x if x is None else x.to(source.device) for x in source.data.rows(index, torch.zeros_like(index))[:2]
    )
    drop = None if labels is None else torch.zeros(len(index), dtype=torch.bool, device=source.device)
    return Batch(x_0, labels, index.to(source.device), drop)


def lines(stage: Stage, found: Rounding, rows: int) -> list[str]:
    """What was measured, in words: a line for each run of parts that are alike. rows: of one forward."""
    out, together = [], {}
    for k, part in enumerate(found.parts):
        together.setdefault(found.wide(k, rows), []).append(part)
    for wide, parts in together.items():
        low, high = (pick(min(p.ratio) if pick is min else max(p.ratio) for p in parts) for pick in (min, max))
        spans = [s / t for p in parts for s, t in zip(p.span, p.t)]
        of = "no row" if not wide else "every row" if wide == rows else f"{wide} of {rows} rows"
        out.append(
            f"{stage.precision} rounds {low:.2g} to {high:.2g} of f(x_t) - f(x_r) at steps of {min(spans):.2g} to "
            f"{max(spans):.2g} t; beyond {found.limit:g} it is fp32: {of}"
        )
    return out


def _why(stage: Stage, found: Rounding) -> str:
    assert isinstance(stage.objective, Ect)
    at = lambda pick: pick((ratio, t, span) for p in found.parts for ratio, t, span in zip(p.ratio, p.t, p.span))
    (best, t, span), (worst, *_) = at(min), at(max)
    return (
        f"{stage.precision!r} rounds off {best:.2g} of f(x_t) - f(x_r) where it is best, at t = {t:.2g}, t - r = {span:.2g}, and "
        f"{worst:.2g} where it is worst; rounding_limit is {found.limit:g}; take 'tf32' or 'fp32', or "
        f"wider steps (objective.q is {stage.objective.q:g})"
    )
