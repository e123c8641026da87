"""What training is about to see: the first rows of its order, normalised, mirrored and drawn from as a step has them."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.data import classes
from cmt_fast.data.order import Order
from cmt_fast.data.rows import Rows
from cmt_fast.render.look import Look
from cmt_fast.run.decoding import Decoding

SHOWN = 16
POINTS = 2000  # of data that are no images
ROWS = 256  # whose values make the histogram
MOST_VALUES = 1 << 24


def gather(data: Rows, decoding: Decoding, seed: int, title: str, shown: int = SHOWN) -> Look:
    """The first rows in training order of a seed. Raises ValueError where a row is damaged.

    Latents are decoded where their autoencoder is at hand; else three of their channels are shown, and a line says so.
    """
    images = len(data.shape) == 3
    shown = min(shown if images else POINTS, data.n)
    n = min(data.n, max(shown, min(ROWS, MOST_VALUES // torch.Size(data.shape).numel())))
    x, labels = first_rows(data, seed, n)
    lines = [f"{data.n:,} rows of {' x '.join(map(str, data.shape))}", f"the first {shown:,} rows of seed {seed}"]
    samples = x[:shown]
    if images:
        samples, note = decoding.visible(samples.to(decoding.device))
        samples = samples.cpu()
        if note:
            lines.append(f"{note} channels are shown" + f": {decoding.why}" * bool(decoding.why))
    elif samples.shape[1] != 2:
        samples = samples[:, :2]
        lines.append(f"2 of {data.shape[0]} numbers of a row are shown")
    names = classes.names(data)
    of = [""] * shown if labels is None else [names[y] for y in labels[:shown].tolist()]
    counts = [(name, rows) for name, rows in zip(names, classes.counts(data).tolist()) if rows]
    lines.append(classes.line(data))
    values = x.transpose(0, 1).flatten(1)
    lines.append(f"values of {n:,} rows: {values.min():.4g} to {values.max():.4g}, std {values.std():.4g}")
    return Look(title, samples, of, values, counts, lines)


def first_rows(data: Rows, seed: int, n: int) -> tuple[Tensor, Tensor | None]:
    """Rows 0 to n - 1 of training's order, as a step gets them, on the CPU: x (n, ...), labels (n,) or None."""
    parts = []
    order = Order(data, seed)
    for position in torch.arange(n).split(64):
        index, epoch = order(position)
        parts.append(data.rows(index, epoch, seed))
    labels = [y for _, y in parts if y is not None]
    return torch.cat([x for x, _ in parts]), torch.cat(labels) if labels else None
