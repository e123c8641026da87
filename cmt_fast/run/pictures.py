"""Pictures of what a stage draws: a grid, the way from one noise to another, one noise through more and more steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.data.autoencoder import Codec
from cmt_fast.objectives import check_steps
from cmt_fast.render import grids
from cmt_fast.run.samples import PIECE, Drawing, as_bytes
from cmt_fast.runtime import words

ROW = 10
PAIRS, BETWEEN = 6, 9  # rows of an interpolation, and pictures in each
STEPS = (1, 2, 4, 8)


def grid(drawing: Drawing, path: Path) -> str:
    """The first samples, ten a row; vectors as points. Returns what is shown of them, "" where it is all."""
    images = drawing.shown()
    shown, note = _visible(drawing, images)
    rows = [shown] if shown.ndim == 2 else list(shown.split(ROW))
    r = drawing.request
    title = f"{words.steps(r.steps)}\n{note}"
    grids.grid([(title if i == 0 else "", row) for i, row in enumerate(rows)], path)
    return note


def interpolation(drawing: Drawing, path: Path, pairs: int = PAIRS) -> str:
    """A row a pair: from the noise of sample 2i to that of 2i + 1 along the sphere, all of the label of sample i.

    pairs: at most, of the samples that are asked for. Noise between steps is that of sample 2i along a row. Returns what is
    shown, as `grid`. Raises ConfigError for one sample alone, and for samples that are no images.
    """
    r, setting = drawing.request, drawing.setting
    _images(drawing, "--interpolate")
    pairs = min(pairs, r.n // 2)
    if not pairs:
        raise ConfigError(f"--interpolate: goes from one sample to another, and --n is {r.n}")
    first = torch.arange(r.first, r.first + 2 * pairs, 2)
    a, b = (setting.noise(r.seed, index.to(setting.device)) for index in (first, first + 1))
    between = torch.linspace(0, 1, BETWEEN)
    noise = torch.stack([slerp(a, b, float(f)) for f in between], 1).flatten(0, 1)  # (pairs * BETWEEN, ...)
    labels = setting.labels(torch.arange(r.first, r.first + pairs))
    repeated = None if labels is None else labels.repeat_interleave(BETWEEN)
    along = setting.starting(noise, repeated, first.repeat_interleave(BETWEEN))
    index = torch.arange(pairs * BETWEEN)
    parts = [along.draw(drawing.net, r.steps, r.seed, i, r.solver) for i in index.split(r.batch)]
    shown, note = _visible(drawing, _finished(drawing.codec, torch.cat(parts)))
    rows = shown.split(BETWEEN)
    titles = [f"{int(i)} to {int(i) + 1}" for i in first]
    grids.grid([(t if k else f"{t}\n{note}", row) for k, (t, row) in enumerate(zip(titles, rows))], path)
    return note


def strip(drawing: Drawing, path: Path, steps: Sequence[int] | None = None) -> tuple[str, list[str]]:
    """A row a number of steps: the same noise and labels through each.

    steps: default 1, 2, 4, 8, of which those that the sampler cannot take are passed over. Returns what is shown, as `grid`, and
    why those were. Raises ConfigError for given steps that it cannot take, and for samples that are no images.
    """
    r, setting = drawing.request, drawing.setting
    _images(drawing, "--strip")
    if steps is not None:
        setting.check_steps(steps, r.solver, "--strip-steps")
    can, left = [], []
    for k in steps or STEPS:
        try:
            setting.check_steps((k,), r.solver, "--strip-steps")
            if not r.solver:
                check_steps(drawing.work.run.stages[drawing.stage].objective, (k,), "--strip-steps")
            can.append(k)
        except ConfigError as error:
            left.append(f"{words.steps(k)}: {error.reason or error}")
    if not can:
        raise ConfigError(f"--strip: the sampler takes none of {', '.join(map(str, STEPS))} steps; give --strip-steps")
    index = torch.arange(r.first, r.first + min(r.n, ROW))
    rows, note = [], ""
    for k, x in setting.draw_each(drawing.net, tuple(can), r.seed, index, r.solver):
        shown, note = _visible(drawing, _finished(drawing.codec, x))
        rows.append((f"{words.steps(k)}\n{note}", shown))
    grids.grid(rows, path)
    return note, left


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a to b (n, ...) along the great circle between them, row by row, lengths along a line; share 0 is a, 1 is b.

    Points on the straight line are shorter than noise is, and networks have not seen such.
    """
    x, y = a.flatten(1).double(), b.flatten(1).double()
    lengths = [v.norm(dim=1, keepdim=True) for v in (x, y)]
    x, y = x / lengths[0], y / lengths[1]
    angle = (x * y).sum(1, keepdim=True).clamp(-1, 1).acos()
    whole = angle.sin()
    mixed = torch.where(
        whole > 1e-6,
        (((1 - share) * angle).sin() * x + (share * angle).sin() * y) / whole.clamp_min(1e-6),
        (1 - share) * x + share * y,
    )
    out = mixed * torch.lerp(lengths[0], lengths[1], share)
    return out.view_as(a).to(a.dtype)


def steps_of(text: str) -> tuple[int, ...]:
    """`1,2,4` as typed. Raises ConfigError."""
    try:
        return tuple(int(s) for s in text.split(","))
    except ValueError:
        raise ConfigError(f"--strip-steps: {text!r} is not a list of numbers like 1,2,4,8") from None


def _images(drawing: Drawing, key: str) -> None:
    if len(drawing.setting.shape) != 3:
        raise ConfigError(f"{key}: samples are vectors of {math.prod(drawing.setting.shape)} numbers, no images")


def _finished(codec: Codec | None, x: Tensor) -> Tensor:
    """On the CPU, decoded where they are to be."""
    return x.cpu() if codec is None else torch.cat([as_bytes(codec.decode(part)).cpu() for part in x.split(PIECE)])


def _visible(drawing: Drawing, x: Tensor) -> tuple[Tensor, str]:
    """As images in [-1, 1], or points, and what of them is shown."""
    if x.dtype == torch.uint8:
        return x / 127.5 - 1, ""
    if x.ndim == 2:
        return x, ""
    shown, note = drawing.work.decoding.visible(x)
    return shown.cpu(), note
