"""Rows that a loss looks at together: which rows of a step are one set, so that it is the same set however the step is split.

A loss over sets compares samples with each other, so a row's gradient depends on which rows stand beside it. With G sets of M
rows in a step, row i belongs to set i mod G. Process p of P in pass a of A has the rows that leave one remainder mod P A
(train/batches.py). As P A divides G (ResolvedStage.grad_accum_steps refuses what does not), it has whole sets, and its j-th row
is of its set j mod (G / P A): (B,) seen as (M, B / M) has a set in each column. What a set draws is drawn with the id of its
first row. So the number of processes and `micro_batch` change neither the sets nor their numbers, and nothing is exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError


def count(rows: int, group: int) -> int:
    """Sets of `group` rows among these. Raises ConfigError where some are left over."""
    if rows % group:
        raise ConfigError(f"{group} does not divide the {rows} rows that are computed together", "objective.group")
    return rows // group


def firsts(sample: Tensor, group: int) -> Tensor:
    """The id of each set's first row, by which it draws what its rows share. sample: (B,) -> (B / group,)."""
    return sample[: count(len(sample), group)]


def spread(of_sets: Tensor, group: int) -> Tensor:
    """What the sets have, for each of their rows. (S,) -> (group S,)."""
    return of_sets.repeat(group)


def gathered(x: Tensor, group: int) -> Tensor:
    """Rows by set. (B, ...) -> (B / group, group, ...)."""
    return x.unflatten(0, (group, count(len(x), group))).transpose(0, 1)


def scattered(of_rows: Tensor) -> Tensor:
    """Back from rows by set. (S, group) -> (S group,)."""
    return of_rows.transpose(0, 1).flatten()


def positions(rows: Tensor, own: int, group: int) -> Tensor:
    """Where the rows (B,) of a step of `own` stand if its sets come one after the other: set i mod G, place i // G. (B,)."""
    sets = count(own, group)
    return rows % sets * group + torch.div(rows, sets, rounding_mode="floor")
