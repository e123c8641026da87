"""One picture of a data set: samples with their classes' names, the histogram of their values, rows a class."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cmt_fast.render import plots
from cmt_fast.runtime.words import one_line

COLUMNS = 8
BINS = 120
MOST_CLASSES = 40  # bars that can be told apart


class Look(NamedTuple):
    """What is drawn.

    samples: images (n, C, H, W) in [-1, 1], C 1 or 3, or points (n, 2); names: of each sample's class, "" without one.
    values: (C, M) numbers as the network sees them, channel by channel; counts: (name, rows) of each class that has some.
    title: what it is a picture of; lines: what else a reader should know.
    """

    title: str
    samples: Tensor
    names: list[str]
    values: Tensor
    counts: list[tuple[str, int]]
    lines: list[str]


def draw(look: Look, path: Path) -> None:
    """Write the picture as a PNG file; its folder is made."""
    plots.png(lambda figure: _draw(look, figure), path, 11.0, 7.6)


def _draw(look: Look, figure: Any) -> None:
    look = look._replace(
        title=one_line(look.title), names=[*map(one_line, look.names)], counts=[(one_line(n), k) for n, k in look.counts],
        lines=[*map(one_line, look.lines)],
    )  # fmt: skip
    words = "\n".join([look.title, *textwrap.wrap("; ".join(look.lines), 150)])
    figure.suptitle(words, fontsize=9, x=0.01, ha="left", parse_math=False)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    if look.samples.ndim == 2:
        _points(look, top.subplots())
    else:
        _tiles(look, top)
    values, counts = bottom.subplots(1, 2, width_ratios=(1.3, 1)) if look.counts else (bottom.subplots(), None)
    _values(look.values, values)
    if counts is not None:
        _counts(look.counts, counts)


def _tiles(look: Look, figure: Any) -> None:
    rows = -(-len(look.samples) // COLUMNS)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for one in axes:
        one.set_axis_off()
    for one, image, name in zip(axes, look.samples, look.names):
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if pixels.shape[-1] == 1 else {}
        one.imshow(pixels[..., 0] if grey else pixels, interpolation="nearest", **grey)
        one.set_title(textwrap.shorten(name, 22, placeholder="..."), fontsize=8, parse_math=False)


def _points(look: Look, axes: Any) -> None:
    """Points by class, the axes alike."""
    names = list(dict.fromkeys(look.names))
    drawn = []
    for k, name in enumerate(names):
        chosen = look.samples[[n == name for n in look.names]].cpu()
        drawn.append(axes.scatter(chosen[:, 0], chosen[:, 1], s=6, color=plots.CYCLE[k % len(plots.CYCLE)]))
    axes.set_aspect("equal")
    if any(names):
        # given one by one: of itself matplotlib leaves out what begins with _, and sets what stands between $ as mathematics
        known = [(points, name) for points, name in zip(drawn, names) if name]
        legend = axes.legend(*zip(*known), loc="center left", bbox_to_anchor=(1, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)


def _values(values: Tensor, axes: Any) -> None:
    numbers = values.double().cpu().numpy()
    low, high = float(numbers.min()), float(numbers.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    for c, channel in enumerate(numbers):
        text = f"channel {c}: {channel.min():.3g} to {channel.max():.3g}, mean {channel.mean():.3g}, std {channel.std():.3g}"
        color = plots.CYCLE[c % len(plots.CYCLE)]
        axes.hist(channel, edges, histtype="step", density=True, color=color, label=text if c < 8 else None)
    axes.set_title("values as the network sees them", loc="left")
    axes.set_yticks([])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _counts(counts: list[tuple[str, int]], axes: Any) -> None:
    shown = counts if len(counts) <= MOST_CLASSES else sorted(counts, key=lambda pair: -pair[1])[:MOST_CLASSES]
    axes.bar(range(len(shown)), [n for _, n in shown], color=plots.BLUE)
    axes.set_xticks(
        range(len(shown)),
        [textwrap.shorten(name, 16, placeholder="...") for name, _ in shown],
        rotation=90,
        parse_math=False,
    )
    axes.tick_params(axis="x", labelsize=7)
    of = f"the {MOST_CLASSES} largest of {len(counts):,} classes" if len(counts) > MOST_CLASSES else "each class"
    axes.set_title(f"rows of {of}", loc="left")
