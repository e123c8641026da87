"""docs/RECIPE.png: samples of every stage of a run in one step, and the Fréchet distance against student images over seeds.

The samples are drawn by the run's own weights (`cmt sample`), all from the same noise. The curves are those of
bench/results/cpu/RECIPE-seeds.json, where each seed's evaluations during training stand; so the picture shows no figure
that a table does not hold.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cmt_fast import cli

STAGES = {
    "pre": ("pre-trained", "#777777"),
    "control": ("post-training only", "#d55e00"),
    "mid": ("mid-training", "#0072b2"),
    "post": ("mid- and post-training", "#009e73"),
}
COUNT, STEPS = 10, "1"


def draw(run: Path, results: Path, out: Path) -> list[Path]:
    """Write a run's picture into `out`; none of a recipe that was not measured over seeds.

    Raises ValueError where a stage of the run cannot be sampled.
    """
    name = json.loads((run / "run.json").read_text("utf-8"))["run"]["name"]
    seeds, file = results / f"{name}-seeds.json", out / f"{name}.png"
    if not seeds.is_file():
        return []
    out.mkdir(parents=True, exist_ok=True)
    _figure({stage: samples(run / stage) for stage in STAGES}, json.loads(seeds.read_text("utf-8")), file)
    return [file]


def samples(stage: Path) -> np.ndarray:
    """COUNT samples of a stage in one step, (COUNT, H, W, C), by the command. Raises ValueError where it fails."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "samples.npz"
        code = cli.main(["sample", str(stage), "--steps", STEPS, "--n", str(COUNT), "--seed", "0", "--out", str(file)])
        if code:
            raise ValueError(f"{stage}: cannot be sampled")
        with np.load(file) as arrays:
            return arrays["images"].transpose(0, 2, 3, 1)


def curves(seed: dict[str, Any], images: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    """Stage -> (student images, distance) during the training of one seed; post goes on where mid ends."""
    of = lambda stage, before: [(before + row["nimg"], row[STEPS]) for row in seed["curve"][stage]]
    mid = of("mid", 0)
    return {"control": of("control", 0), "mid": mid, "post": [mid[-1], *of("post", images["mid"])]}


def _figure(images: dict[str, np.ndarray], data: dict[str, Any], file: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": "#e3e3e3", "grid.linewidth": 0.6, "legend.frameon": False}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(10.4, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _samples(left, images)
        _curves(right, data)
        figure.savefig(file, dpi=120, metadata={"Software": None})


def _samples(axes, images: dict[str, np.ndarray]) -> None:
    tile = lambda x: np.pad((np.clip(x, -1, 1) + 1) / 2, ((1, 1), (1, 1), (0, 0)), constant_values=1)
    rows = [np.concatenate([tile(x) for x in images[stage]], axis=1) for stage in STAGES]
    height = len(rows[0])
    axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title("samples in one step, from the same noise", loc="left")
    axes.set_yticks(
        [(i + 0.5) * height - 0.5 for i in range(len(rows))], labels=[title for title, _ in STAGES.values()]
    )
    for label, (_, color) in zip(axes.get_yticklabels(), STAGES.values()):
        label.set_color(color)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _curves(axes, data: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    for i, seed in enumerate(data["seeds"]):
        for stage, points in curves(seed, data["images"]).items():
            title, color = STAGES[stage]
            axes.plot(*zip(*points), color=color, marker="o", markersize=3, linewidth=1.4, label=None if i else title)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("student images")
    axes.set_title(f"Fréchet distance in one step, {len(data['seeds'])} seeds", loc="left")
    axes.legend()
