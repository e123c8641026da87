"""Tables of the recipes that come with the package: what each header says, and their settings."""

from __future__ import annotations

from cmt_fast.config import loading, recipes
from cmt_fast.config.schema import Stage


def published(_: str = "") -> str:
    """Each recipe's header: what was published, what is known of it, what was chosen here."""
    out = []
    for name, path in recipes.recipes().items():
        lines = path.read_text("utf-8").splitlines()
        header = [line.removeprefix("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
        if "published" in " ".join(header).lower():
            out.append(f"- **`{name}`.** " + "  \n  ".join(header))
    return "\n".join(out).replace("|", "\\|") + "\n"


def settings(_: str = "") -> str:
    """One row a recipe and stage."""
    lines = [
        "| recipe, stage | objective | images | batch | trajectories | optimizer, learning rate | EMA | precision |",
        "|---|---|---:|---:|---|---|---|---|",
    ]
    for name in recipes.recipes():
        for key, stage in loading.load(name).stages.items():
            lines.append(f"| {name}, {key} | {' | '.join(cells(stage))} |")
    return "\n".join(lines) + "\n"


def cells(stage: Stage) -> tuple[str, ...]:
    """What the table says of a stage."""
    anchor, t = stage.anchor, stage.trajectories
    rollout = f"{t.solver}{f' {t.order}' if t.solver == 'dpmpp' else ''}, {t.nfe} calls" if t else ""
    ema = ", ".join(f"{e.beta:g}" if e.kind == "constant" else f"power {e.sigma_rel:g}" for e in stage.ema)
    return (
        stage.objective.kind + (f" + anchor {anchor.objective.kind}" if anchor else ""), f"{stage.images_nimg:,}",
        f"{stage.batch:,}", rollout, f"{stage.optimizer} {stage.lr:g}, {stage.lr_schedule}", ema, stage.precision,
    )  # fmt: skip
