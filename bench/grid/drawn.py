"""The grid in one picture: the distance over that from `pre`, of every objective, with its interval over seeds.

A row of panels is a start, a column an equality. Right of the line mid-training loses. Objectives stand in one order in all
panels, those that lose the most at equal images from `mid` on top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.grid.cells import EQUAL
from bench.grid.judged import SPACES, Table
from cmt_fast.render import plots

STARTS = ("mid", "anchored")
FARTHEST = 40.0  # times, beyond which an interval is cut
SHOWN = {"frechet": ("first space", plots.BLUE, "o", -0.14), "frechet_2": ("second space", plots.ORANGE, "s", 0.14)}


def draw(data: dict[str, Any], file: Path, k: str = "1") -> Path:
    """data: as `bench grid` writes it; k: steps of the sampler."""
    found = Table(data["rows"])
    names = found.sorted("mid", "images")

    def panels(figure: Any) -> None:
        axes = figure.subplots(len(STARTS), len(EQUAL), sharex=True, sharey=True, squeeze=False)
        for row, start in zip(axes, STARTS):
            for ax, equal in zip(row, EQUAL):
                _panel(ax, found, names, start, equal, k)
        for ax in axes[-1]:
            ax.set_xlabel(f"distance over that from pre, {k} step{'s' * (k != '1')}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower left", ncols=2)

    plots.png(panels, file, 8.2, 1.9 + 0.5 * len(names))
    return file


def _panel(ax: Any, found: Table, names: list[str], start: str, equal: str, k: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ax.axvline(1.0, color=plots.BLACK, linewidth=1)
    ax.set_xscale("log")
    for space in SPACES:
        label, color, marker, way = SHOWN[space]
        for i, name in enumerate(names):
            e = found.effect(name, start, equal, k, space)
            if e is None:
                continue
            low, high = max(e.low, 1 / FARTHEST / 2), min(e.high, FARTHEST * 2)
            ax.plot([low, high], [i + way] * 2, color=color, linewidth=1.4)
            ax.plot([e.value], [i + way], marker, color=color, markersize=4.5, label=label if not i else None)
    for i, name in enumerate(names):
        if failed := found.failures(name, start, equal):
            ax.text(FARTHEST, i, f"{failed} failed", ha="right", va="center", fontsize=7, color=plots.BLACK)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(1 / FARTHEST, FARTHEST)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks([0.03, 0.1, 0.3, 1, 3, 10, 30])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_title(f"from mid{', anchored' * (start == 'anchored')}, equal {equal}", loc="left")
