"""The picture of an objective in the plane: where the ODE leads, where one step of the network leads, how the error falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from cmt_fast.render import plots

SIDE = 2.6  # inches of a plane
LINES = 30  # noises whose path or jump is drawn
NAMES = {"pre": "from the diffusion model", "mid": "from mid-training"}


def draw(scene: Any, path: Path) -> None:
    """Write the picture of a scene (evaluation/plane) as a PNG file: as wide as a page, so that its text is read as it is."""
    plots.png(lambda figure: _draw(scene, figure), path, 3 * SIDE, 2 * SIDE)


def _draw(scene: Any, figure: Any) -> None:
    grid = figure.add_gridspec(2, 3)
    first = [figure.add_subplot(grid[divmod(k, 3)]) for k in range(2 + len(scene.learned))]
    _field(scene, first[0])
    _jumps(scene, first[1], scene.before, "diffusion model, one step")
    for place, (start, learned) in zip(first[2:], scene.learned.items()):
        _jumps(scene, place, learned.ends, f"{scene.kind} {NAMES[start]}")
    _curves(scene, figure.add_subplot(grid[1, len(first) - 3 :]))


def _plane(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=8, parse_math=False)
    axes.set_aspect("equal")
    axes.set_xlim(-2.1, 2.1)
    axes.set_ylim(-2.1, 2.1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _field(scene: Any, axes: Any) -> None:
    """Trajectories of the exact ODE over the data."""
    _plane(axes, "the ODE, from noise to data\n ")
    axes.scatter(*scene.data[:900].T, s=1, color="#dddddd", linewidths=0)
    for k in range(min(LINES, scene.paths.shape[1])):
        axes.plot(*scene.paths[:, k].T, color=plots.BLUE, linewidth=0.6, alpha=0.7)
    axes.scatter(*scene.paths[0, :LINES].T, s=5, color=plots.GREY, linewidths=0, zorder=3)
    axes.scatter(*scene.paths[-1, :LINES].T, s=6, color=plots.BLUE, linewidths=0, zorder=3)


def _jumps(scene: Any, axes: Any, ends: Tensor, title: str) -> None:
    """Lines from some noises to where one step puts them; an end is the lighter, the farther it is from the exact one."""
    error = (ends - scene.exact).norm(dim=1)
    rms = float(error.square().mean().sqrt())
    _plane(axes, f"{title}\nRMS error {rms:.3g}")
    axes.scatter(*scene.data[:900].T, s=1, color="#dddddd", linewidths=0)
    for a, b in zip(scene.starts[:LINES], ends[:LINES]):
        axes.plot((a[0], b[0]), (a[1], b[1]), color=plots.GREY, linewidth=0.3, alpha=0.6)
    axes.scatter(*ends[:400].T, s=3, c=error[:400], cmap="viridis", vmin=0, vmax=0.8, linewidths=0, zorder=3)


def _curves(scene: Any, axes: Any) -> None:
    """RMS distance to the exact map, and of samples to data, against student images."""
    for start, color in (("pre", plots.ORANGE), ("mid", plots.GREEN)):
        if start in scene.learned:
            images, rms, apart = zip(*scene.learned[start].curve)
            axes.plot([n / 1000 for n in images], rms, color=color, label=NAMES[start])
            axes.plot([n / 1000 for n in images], apart, color=color, linestyle=":")
            if prepared := scene.learned[start].prepared:
                axes.axvline(prepared / 1000, color=plots.GREY, linewidth=0.8, label="mid-training ends")
    axes.set_yscale("log")
    axes.set_title("error: map (line), samples (dots)", loc="left", fontsize=8)
    axes.set_xlabel("thousand student images")
    axes.legend(fontsize=8)
