"""The report's figures as small inline SVG: quality against images, losses, solver order, gradient bias. Others as PNG.

matplotlib is imported inside `svg` and `png` only, without pyplot: no global figure, no display, no state left behind.
Equal data give equal bytes: fixed hash salt, no date, text as text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmt_fast.runtime.words import printable
from cmt_fast.storage import files

Points = Sequence[tuple[float, float]]

# Okabe & Ito
BLUE, GREEN, ORANGE, PURPLE, GREY, BLACK = "#0072b2", "#009e73", "#d55e00", "#9a4f8c", "#777777", "#222222"
COLORS = {"pre": GREY, "mid": BLUE, "post": GREEN, "control": ORANGE}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, BLACK, "#b8860b", "#56b4e9", "#a0522d", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cmt",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def svg(title: str, draw: Callable[[Any], None], width: float = 4.6, height: float = 3.0) -> str:
    """`draw(axes)` as an <svg> element. width, height: inches at 72 units each; the page scales it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    title = printable(title)
    with rc_context({**_STYLE, "svg.hashsalt": title}):  # ids of two figures on one page stay apart
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", parse_math=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _slim(out.getvalue(), title)


def png(draw: Callable[[Any], None], path: Path, width: float, height: float) -> None:
    """`draw(figure)` as a PNG file, whole or not there; its folder is made. width, height: inches at 110 pixels each."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.by_rename(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


def _slim(text: str, title: str) -> str:
    """Without prolog, metadata, comments and the names of groups nothing refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[\w.]+_\d+">', "<g>", text)
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", text)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return re.sub(r">\s+<", "><", text).strip() + "\n"


# ---------------------------------------------------------------------------------------------- axes


def _images(axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _ticks(axis, values: Sequence[float]) -> None:
    """Plain numbers at these values and nowhere else."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values), labels=[f"{value:g}" for value in values])


def _log(axis, values: Sequence[float]) -> None:
    """A log axis whose labels are plain numbers: 1, 2, 5 of each decade where there are few, else its powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 1.0
    if decades > 3:
        axis.set_minor_locator(NullLocator())
        return
    subs = (1, 2, 5) if decades > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes, columns: int = 1) -> None:
    """Below the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower left", ncols=columns)


# ---------------------------------------------------------------------------------------------- the run's figures


def quality(steps: str, curves: dict[str, Points], levels: Sequence[tuple[str, float]]) -> str:
    """Fréchet distance against student images at one number of steps.

    curves: stage -> (student images, distance); `post` goes on where `mid` ends. levels: label and distance of what does
    not train, the teacher and real rows.
    """

    def draw(axes) -> None:
        values = [d for points in curves.values() for _, d in points if d > 0]
        axes.set_yscale("log")
        for (label, level), color in zip(levels, (BLACK, PURPLE)):
            if level > 0:
                axes.axhline(level, color=color, linestyle=":", linewidth=1.2, label=label)
                values.append(level)
        for stage, points in curves.items():
            joined = [*curves["mid"][-1:], *points] if stage == "post" and curves.get("mid") else points
            if not joined:
                continue
            x, y = zip(*joined)
            label = {"mid": "mid-training", "post": "then post-training", "control": "control, without"}[stage]
            axes.plot(x, y, color=COLORS[stage], linestyle="--" if stage == "control" else "-")
            own = list(zip(*points))
            axes.plot(
                own[0],
                own[1],
                color=COLORS[stage],
                marker=MARKERS[list(COLORS).index(stage)],
                linestyle="--" if stage == "control" else "-",
                label=label,
            )
        _log(axes.yaxis, values)
        _images(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel("student images")
        axes.set_ylabel("Fréchet distance")
        _legend(axes, 2)

    return svg(f"{steps}: Fréchet distance", draw, 4.6, 3.3)


def loss(stage: str, curve: Points, lr: Points) -> str:
    """Training loss of one stage against its images; the learning rate as a thin line on its own axis."""

    def draw(axes) -> None:
        x, y = zip(*curve)
        if min(y) > 0:
            axes.set_yscale("log")
            _log(axes.yaxis, y)
        second = axes.twinx()
        second.plot(*zip(*lr), color=GREY, linewidth=1.2, linestyle=":")
        second.set_ylim(bottom=0)
        second.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
        second.tick_params(labelsize=7)
        second.grid(False)
        second.set_ylabel("learning rate (dotted)", color=GREY, fontsize=8)
        second.spines["right"].set_visible(True)
        axes.plot(x, y, color=COLORS[stage], linewidth=1.3)
        axes.set_zorder(second.get_zorder() + 1)
        axes.patch.set_visible(False)
        _images(axes)
        axes.set_xlabel("images of this stage")
        axes.set_ylabel("loss")

    return svg(f"{stage}: loss", draw, 4.2, 2.5)


# ---------------------------------------------------------------------------------------------- theory


def solver_order(solver: dict[str, Any]) -> str:
    """Error of the solver against network calls by order, log-log; dashed: the fitted slope through the last point."""

    def draw(axes) -> None:
        for i, (order, rms) in enumerate(solver["rms"].items()):
            nfe, slope = solver["nfe"], solver["slopes"][order]
            axes.loglog(nfe, rms, color=CYCLE[i], marker=MARKERS[i], label=f"order {order}: slope {slope:.2f}")
            guide = [rms[-1] * (nfe[-1] / n) ** slope for n in nfe]
            axes.loglog(nfe, guide, color=CYCLE[i], linestyle="--", linewidth=0.8)
        _ticks(axes.xaxis, solver["nfe"])
        axes.set_xlabel("network calls")
        axes.set_ylabel("error at the end point, RMS")
        _legend(axes)

    return svg("Solver error and its order", draw, 4.6, 3.8)


def bias(title: str, rows: dict[str, dict[str, Any]], key: str) -> str:
    """`mse` or `bias` of every target against what is swept, log-log, with the fitted slopes."""

    def draw(axes) -> None:
        for i, (name, row) in enumerate(rows.items()):
            kept = [(x, y) for x, y in zip(row["x"], row[key]) if x > 0 and y > 0]
            if kept:
                label = f"{name}: slope {round(row['slope_' + key], 2) + 0.0:.2f}"
                style = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}
                axes.loglog(*zip(*kept), label=label, **style)
        axes.set_xlabel(", ".join(dict.fromkeys(row["swept"] for row in rows.values())))
        _legend(axes)

    return svg(title, draw, 4.6, 3.4 + 0.16 * len(rows))
