"""What each section of the report says: facts of a run in, tables and pictures out."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cmt_fast import checkpoint, config, log, plots
from cmt_fast.templates import Group, Picture, Section, Table, png
from cmt_fast.workspace import Workspace

if TYPE_CHECKING:
    from cmt_fast.report import Judged, Stand

DASH, RATIO = "–", "post / control"
DATA = {"digits": "8 x 8 handwritten digits", "gmm": "points of a 2-D Gaussian mixture", "npz": "images of a file"}
TEXT = 99  # every column is text

def number(value: float | None, form: str = ".4g") -> str:
    return DASH if value is None else format(value, form)


def steps_text(k: int | str) -> str:
    return f"{k} step{'s' * (int(k) > 1)}"


def head(work: Workspace, stands: dict[str, Stand], judged: dict[str, Judged]) -> Section:
    """One sentence on the run, the result in a line per number of steps, lineage."""
    run, shape = work.run, " x ".join(map(str, work.data.shape))
    parameters = sum(p.numel() for p in work.build().parameters())
    kinds = {name: s.objective for name, s in stands.items()}
    text = [
        f"A network ({run.model.kind}, {parameters:,} parameters) for {DATA[run.data.kind]} ({len(work.data.x):,} of {shape}): "
        f"pre-trained as a diffusion model ({kinds['pre']}, path {run.path}), mid-trained ({kinds['mid']}) and post-trained "
        f"({kinds['post']}) into a generator of {' or '.join(map(str, run.eval.steps))} steps"
        + (f"; the control is post-trained ({kinds['control']}) straight from the pre-trained network." if run.control else ".")
    ]
    for k in map(str, run.eval.steps):
        a, b = (judged[name].few.get(k) if name in judged else None for name in ("post", "control"))
        if a and b and b["frechet"] > 0:
            text.append(f"{steps_text(k)}: Fréchet distance {a['frechet']:.4g} with mid-training, {b['frechet']:.4g} without "
                        f"(ratio {a['frechet'] / b['frechet']:.3g}).")
    rows = []
    for s in stands.values():
        m, parent = s.manifest or {}, DASH
        if m.get("parent"):
            p = m["parent"]
            anew = p["stage"] in stands and stands[p["stage"]].ema != p["ema"]
            parent = f"{p['stage']} @ {p['nimg']:,}, {p['ema'][:12]}" + (" (trained anew since)" if anew else "")
        nimg, digest = number(m.get("nimg"), ","), m.get("config", DASH)[:12]
        rows.append([s.name, s.objective, parent, nimg, s.ema[:12] or DASH, digest, s.state])
    columns = ["stage", "objective", "starts from (images, EMA)", "images", "EMA checksum", "config digest", "state"]
    return Section("", text, [Group([Table("Lineage", columns, rows, left=TEXT)], wide=True)])


def quality_table(work: Workspace, done: dict[str, Stand], judged: dict[str, Judged], k: int) -> Table:
    """What every network makes in k steps, against the teacher's many."""
    n, solver, rows = str(work.run.sampler.teacher_steps), work.run.sampler.solver, []
    titles = {"pre": "pre-trained as it is", "mid": "mid", "post": "post", "control": "control"}
    entries = [(f"teacher, {solver}, {steps_text(n)}", "pre", 0, judged["pre"].solver[n])] if "pre" in done else []
    entries += [(titles[name], *path_of(s.manifest or {}), judged[name].few[str(k)]) for name, s in done.items()]
    columns = {"frechet": f"Fréchet, {work.space.name}", "accuracy": "accuracy", "sliced_wasserstein": "sliced Wasserstein"}
    columns = {c: title for c, title in columns.items() if any(f and c in f for *_, f in entries)}
    for title, path, nimg, figures in entries:
        cells = [number(figures[c], ".1%" if c == "accuracy" else ".4g") if figures else "not finite" for c in columns]
        rows.append([title, path, f"{nimg:,}", *cells])
    a, b = (next((e for e in entries if e[0] == name), None) for name in ("post", "control"))
    both = bool(a and b and a[3] and b[3])
    if both:
        share = lambda x, y: number(x / y, ".3g") if y else DASH
        rows.append([RATIO, "", share(a[2], b[2]), *(share(a[3][c], b[3][c]) for c in columns)])
    return Table(steps_text(k), ["network", "path", "student images", *columns.values()], rows, left=2, strong=both)


def summary(tables: list[Table], steps: tuple[int, ...], extractor: str) -> Table:
    """The quality tables as one for the terminal: distance and accuracy by number of steps."""
    shown = [i for i, title in enumerate(tables[0].head) if title == "accuracy" or title.startswith("Fréchet")]
    columns = [f"{tables[0].head[i].partition(',')[0]} @{k}" for k in steps for i in shown]
    rows = [[a[0][0], a[0][2], *(row[i] for row in a for i in shown if i < len(row))] for a in zip(*(t.rows for t in tables))]
    return Table(f"Fréchet: {extractor}; @k: in k steps", ["network", "student images", *columns], rows)


def quality(work: Workspace, stands: dict[str, Stand], tables: list[Table]) -> Section:
    """The tables with and without mid-training, and in what post-training and control differ besides."""
    run, e = work.run, work.run.eval
    groups = [Group(tables, wide=True)]  # type: ignore[arg-type]
    text = (
        f"Each network draws {e.n:,} samples with its EMA weights, from the same noise and labels (seed {e.seed}). Student images: "
        "what was trained on after pre-training, added up along the path. Lower distances are better. "
        "The teacher is the pre-trained network through the ODE solver; as it is, it takes the few steps of the others."
    )
    if run.control:
        tree = config.dump(run)
        rows = differences(tree["post"], tree["control"])
        note = "The control is a recipe of its own, not post-training with one thing left out."
        groups.append(Group([Table("Settings that differ", ["key", "post", "control"], rows, note, left=TEXT)], wide=True))
    return Section("Quality, with and without mid-training", [text], groups)


def differences(a: dict, b: dict, prefix: str = "") -> list[list[str]]:
    """Dotted keys in which two settings differ, with both values; a table that only one has is one row."""
    rows: list[list[str]] = []
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            rows += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            shown = (DASH if v is None else json.dumps(v).translate({ord(c): None for c in '"{}'}) for v in (x, y))
            rows.append([f"{prefix}{key}", *shown])
    return rows


def reach_table(reached: list[dict[str, Any]]) -> Table:
    """`reach_rows` for the reader."""
    rows = []
    for r in reached:
        n, last = r["control_nimg"], r["control_last"]
        if n is None:
            text, times = f"not reached within {last:,} images", f"> {last / r['nimg']:.2f}" if last > r["nimg"] else DASH
        else:
            text = f"{round(n):,}" if n > r["control_first"] else f"at most {n:,}, its first evaluation"
            times = f"{'' if n > r['control_first'] else '<= '}{n / r['nimg']:.2f}"
        rows.append([steps_text(r["steps"]), f"end of {r['stage']}", number(r["frechet"]), f"{r['nimg']:,}", text, times])
    columns = ["samples in", "at the", "Fréchet", "its student images", "images the control needs", "ratio of images"]
    return Table("Images the control needs to reach what mid-training reaches", columns, rows, left=2, note=(
        "The first point at which the control's distance is at or below; log distance is interpolated linearly between "
        "evaluations. Images are not compute: teacher rollouts cost network calls besides, see the seconds below."
    ))


def curves(work: Workspace, stands: dict[str, Stand], judged: dict[str, Judged], reached: list[dict[str, Any]]) -> Section:
    """Fréchet distance against student images, one panel per number of steps."""
    run, figures, n = work.run, [], work.run.sampler.teacher_steps
    teacher = judged["pre"].solver[str(n)] if "pre" in judged else None
    line = (f"teacher, {steps_text(n)}", teacher["frechet"]) if teacher else None
    for k in run.eval.steps:
        lines = {name: p for name in ("mid", "post", "control") if (p := points(stands, name, k))}
        if lines:
            picture = plots.quality(steps_text(k), lines, line)
            figures.append(Picture(f"Samples in {steps_text(k)}: Fréchet distance by student images.", f"quality-{k}.svg", picture))
    groups = [Group(figures)] if figures else []
    groups += [Group([reach_table(reached)], wide=True)] if reached else []
    text = f"Judged during training on {run.eval.n_during:,} samples (the teacher on {run.eval.n:,}). Post-training goes on from the images of mid-training."
    return Section("Quality by images", [text], groups)


def training(stands: dict[str, Stand]) -> Section:
    """Losses, images, seconds of every stage that has begun."""
    rows, figures = [], []
    for s in stands.values():
        train = s.kind("train")
        if not train:
            continue
        first, last, m = train[0], train[-1], s.manifest
        wall = m["wall"] if m and m["step"] == last["step"] else last["wall"]  # a manifest's has the last judging in it
        seconds = [f"{wall['train_s']:,.1f}", f"{wall['eval_s']:,.1f}", f"{last['wall']['images_per_s']:,.0f}"]
        rows.append([s.name, s.objective, f"{last['nimg']:,}", f"{s.stage.batch:,}", number(first["loss"]), number(last["loss"]),
                     f"{first['lr']:.3g} to {last['lr']:.3g}", *seconds])
        lines = ([(row["nimg"], row[key]) for row in train] for key in ("loss", "lr"))
        figures.append(Picture(f"{s.name}: loss, and learning rate (dotted).", f"loss-{s.name}.svg", plots.loss(s.name, *lines)))
    columns = ["stage", "objective", "images", "batch", "first loss", "last loss", "learning rate", "s training", "s judging", "images/s"]
    note = ("First and last are means over about a fiftieth of the stage. Losses of different objectives do not compare. "
            "Seconds of training hold the teacher's rollouts; images/s are of training alone.")
    return Section("Stages", [], [Group([Table("", columns, rows, note, left=2)], wide=True), Group(figures)] if rows else [])


def samples(stands: dict[str, Stand]) -> Section:
    """The last grid of every stage, and one stage over its training."""
    at = lambda s, path: f"{s.name} at {int(path.stem) * s.stage.batch:,} images."
    last = [png(at(s, s.grids[-1]), f"grid-{s.name}.png", s.grids[-1]) for s in stands.values() if s.grids]
    groups, text = [Group(last)] if last else [], "Same noise and labels everywhere."
    story = next((stands[n] for n in ("mid", "post", "control") if n in stands and len(stands[n].grids) > 2), None)
    if story:
        count = min(4, len(story.grids))
        chosen = [story.grids[i * (len(story.grids) - 1) // (count - 1)] for i in range(count)]
        groups.append(Group([png(at(story, p), f"grid-{story.name}-{i + 1}.png", p) for i, p in enumerate(chosen)]))
        text += f" First every stage at its end, then {story.name} in the course of its training."
    return Section("Samples", [text], groups)


def theory(folder: Path) -> Section:
    """Solver order and gradient bias on a Gaussian mixture, measured once and kept in RUN/theory.json."""
    from cmt_fast import theory as bench

    file = folder / "theory.json"
    if not file.is_file():
        log.say("measuring solver order and gradient bias")
        checkpoint.write_text(file, json.dumps(bench.measure(), indent=1))
    figures = json.loads(file.read_text("utf-8"))
    solver, bias = figures["solver"], figures["bias"]
    errors = [[str(n), *(number(rms[i], ".3g") for rms in solver["rms"].values())] for i, n in enumerate(solver["nfe"])]
    errors.append(["slope", *(number(solver["slopes"][order], ".2f") for order in solver["rms"])])
    rows = [[name, r["swept"], r["expected"], number(r["slope_mse"], ".2f"), number(r["slope_bias"], ".2f")] for name, r in bias.items()]
    columns = ["target", "swept", "expected slopes", "slope of MSE", "slope of B"]
    return Section(
        "Theory, where the answer is known",
        ["Measured on a Gaussian mixture whose denoiser and flow map are known; slopes are fitted in log-log. MSE: squared error of "
         "the regression target. B: squared bias of the gradient that it gives."],
        [
            Group([Picture("Error at the end of the solver's path; dashed: fitted slopes.", "solver.svg", plots.solver_order(solver))]
                  + [Picture(f"{title} by what is swept.", f"{key}.svg", plots.bias(bias, key, title))
                     for key, title in (("mse", "MSE of the target"), ("bias", "B, gradient bias"))]),
            Group([Table("Solver error (RMS)", ["network calls", *(f"order {o}" for o in solver["rms"])], errors, strong=True)]),
            Group([Table("Gradient bias", columns, rows, left=3)], wide=True),
        ],
        "All figures as text", bench.as_text(figures),
    )


def surroundings(work: Workspace, about: dict[str, Any]) -> Section:
    """Environment, ops and the resolved recipe."""
    tables = [
        Table(title, head, [[str(k), str(v)] for k, v in about[key].items()], left=TEXT)
        for title, head, key in (("Machine and versions", ["what", "which"], "environment"), ("Ops", ["op", "backend"], "ops"))
    ]
    recipe = yaml.safe_dump(config.dump(work.run), sort_keys=False, allow_unicode=True)
    text = f"Config digest {about['digest']}."
    if about.get("parents"):
        text += f" Stages not trained here are from {about['parents']}."
    return Section("Environment and recipe", [text], [Group(tables)], "The resolved recipe", recipe)  # type: ignore[arg-type]
