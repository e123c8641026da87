"""What many ranks on many machines read, send and write: bytes by formula, so that 64 ranks are counted before they are rented.

N ranks on M machines, P parameters, T EMA tracks, a store of n rows in B bytes. Weights travel as fp32.

    small files of the store     S = index + 8 n labels + 8 n checksums    read N times, or once and sent to N - 1 ranks
    rows of the store            B                                         read by M machines once, or each epoch
    gradients and weights        step_time.sent_bytes                      sent by each rank, each step
    a checkpoint                 (4 + 8 + 4 T) P                           written once; read N times, or once and sent
"""

from __future__ import annotations

import json
from typing import NamedTuple

from cmt_fast.config import loading
from cmt_fast.cost import estimate, hardware, step_time
from cmt_fast.data.latents import Shard
from cmt_fast.data.writing import ROWS as SHARD_ROWS
from cmt_fast.run.resolved import resolve

HEADER = 128  # bytes before the numbers of a .npy file


class Traffic(NamedTuple):
    """Bytes of one thing: as it would be with every rank for itself, and as it is; of all ranks together unless `what` says."""

    what: str
    alone: float
    ours: float
    formula: str


def small_bytes(rows: int, labelled: bool, shards: int) -> int:
    """Bytes of a store's small files: labels and checksums exactly, the index by its list of shards."""
    one = len(json.dumps(vars(Shard(file="shard-00000.bin", rows=SHARD_ROWS)), indent=3)) + 3
    return (8 * rows + HEADER) * (1 + labelled) + one * shards


def checkpoint_bytes(parameters: int, tracks: int) -> int:
    """Bytes of a checkpoint's files: weights, moments and EMA tracks in fp32."""
    return (4 + 8 + 4 * tracks) * parameters


def traffic(recipe: str, stage: str, ranks: int, per_machine: int, card: str = "h100") -> list[Traffic]:
    """What a stage of a recipe moves on `ranks` cards, `per_machine` to a machine. Raises ConfigError as `cmt estimate` does."""
    run = loading.load(recipe)
    resolved, rows, at = resolve(run, stage), estimate.rows_of(run), hardware.card(card, None)
    bill, plan, known = estimate.stage_bill(resolved, rows, at, ranks)
    student, machines = known["student"].parameters, -(-ranks // per_machine)
    n, held = rows.n or 0, rows.store_bytes or 0.0
    small, kept = (
        small_bytes(n, rows.classes > 0, -(-n // SHARD_ROWS)),
        checkpoint_bytes(student, len(resolved.config.ema)),
    )
    epochs = bill.images / n if n else 0.0
    sent = step_time.sent_bytes(plan.stage, student, 0, ranks, resolved.grad_accum_steps(ranks))
    return [
        Traffic("read of the shared disk at a start: small files of the store", ranks * small, small, "N S; S"),
        Traffic("sent at a start: the same to the other ranks", 0, (ranks - 1) * small, "(N - 1) S"),
        Traffic(
            f"read of the shared disk in the stage: rows, {epochs:,.1f} epochs",
            epochs * held,
            machines * held,
            "epochs B; M B",
        ),
        Traffic("local disk of a machine: the copy of the store", 0, held, "B"),
        Traffic("sent by one rank in a step: gradients and weights", sent, sent, "step_time.sent_bytes"),
        Traffic(
            "sent by all ranks in the stage", bill.steps * ranks * sent, bill.steps * ranks * sent, "steps N times that"
        ),
        Traffic("written by the first rank: a checkpoint", kept, kept, "(12 + 4 T) P"),
        Traffic(
            "read of the shared disk at a restart: a checkpoint", ranks * kept, kept, "N (12 + 4 T) P; once, and sent"
        ),
    ]


def table(recipe: str = "imagenet512-ecd", stage: str = "mid", ranks: int = 64, per_machine: int = 8) -> str:
    """The rows as a table of a page, in GB."""
    where = f"`{recipe}`, `{stage}`, {ranks} ranks on {-(-ranks // per_machine)} machines"
    lines = [f"| {where} | each for itself, GB | as it is, GB | bytes |", "|---|---:|---:|---|"]
    for t in traffic(recipe, stage, ranks, per_machine):
        lines.append(f"| {t.what} | {t.alone / 1e9:,.4g} | {t.ours / 1e9:,.4g} | {t.formula} |")
    return "\n".join(lines) + "\n"
