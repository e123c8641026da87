"""Tables of the recipes that come with the package: what each header says, the settings, and the README's five rows."""

from __future__ import annotations

import json
from pathlib import Path

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


TITLES = {
    "pre": "the pre-trained model as it is",
    "mid": "mid-training",
    "post": "mid- and post-training",
    "control": "post-training only",
}


def stages(results: Path, recipe: str) -> str:
    """Distances of each stage over the seeds, and the run over its control. results: the folder of one device."""
    data = json.loads((results / f"{recipe}-seeds.json").read_text("utf-8"))
    seeds, images = data["seeds"], data["images"]
    seen = {**images, "pre": 0, "post": images["mid"] + images["post"]}
    steps = list(seeds[0]["stages"]["post"])
    heads = " | ".join(f"Fréchet, {k} step{'s' * (k != '1')}" for k in steps)
    lines = [f"| stage | student images | {heads} |", "|---|---:|" + "---|" * len(steps)]
    of = lambda stage, k: [r["stages"][stage][k]["frechet"] for r in seeds]
    each = lambda numbers: " / ".join(f"{v:.2f}" for v in numbers)
    for stage, title in TITLES.items():
        lines.append(f"| `{stage}`: {title} | {seen[stage]:,} | {' | '.join(each(of(stage, k)) for k in steps)} |")
    ratios = [each(a / b for a, b in zip(of("post", k), of("control", k))) for k in steps]
    lines.append(f"| ratio: `post` / `control` | {seen['post'] / seen['control']:.3g} | {' | '.join(ratios)} |")
    numbers, e = ", ".join(str(r["seed"]) for r in seeds), data["environment"]
    about = f"Recipe `{recipe}`, seeds {numbers}, in this order; {data['samples']:,} samples; {e['cpu']}, torch {e['torch']}"
    return "\n".join(lines) + f"\n\n{about}; commit {data['commit']}, {data['date']}.\n\n"
