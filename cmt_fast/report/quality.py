"""The first screen of the report and its tables of quality: pictures, one sentence of result, what contradicts it, figures."""

from __future__ import annotations

from typing import Any, NamedTuple

from cmt_fast.config import loading
from cmt_fast.config.schema import Run
from cmt_fast.render.templates import Group, Picture, Section, Table
from cmt_fast.report import verdict
from cmt_fast.report.figures import Figures, Judged, Names
from cmt_fast.report.sections import DATA
from cmt_fast.report.text import TEXT, differences
from cmt_fast.run.standing import Standing
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import words
from cmt_fast.runtime.words import DASH, number

FLOOR, UNSEEN = "real, again (floor)", "real, unseen (estimate)"
TITLES = {"pre": "pre-trained"}


class Quality(NamedTuple):
    """What is known of a run's quality. floor: figures of real rows (Judging.floor); real: sharpness of real rows."""

    judged: dict[str, Judged]
    names: Names
    floor: Figures | None = None
    real: float | None = None

    def of(self, steps: int | str) -> dict[str, Figures | None]:
        """Figures by stage in so many steps."""
        return {name: j.figures(steps) for name, j in self.judged.items()}


def first(work: Workspace, stands: dict[str, Standing], quality: Quality, pictures: list[Picture]) -> Section:
    """Pictures, the result in a line per number of steps, what contradicts it, one sentence on the run."""
    run, steps = work.run, work.run.eval.steps
    headlines = [line for k in steps if (line := headline(stands, quality, k))[0]]
    alerts = [
        line for k in steps for line in verdict.disagreements(quality.of(k), quality.real, run.eval.n, words.steps(k))
    ]
    text = []
    if headlines:
        text.append(
            "Intervals are of 95 %, over other samples of the same networks. Seeds of training are not in them: train again "
            "with another `seed` to know those. "
            f"Feature spaces: first {quality.names.first}, second {quality.names.second}."
        )
    text.append(about(work, stands))
    note = "In a column: the same noise and the same class." if len(work.data.shape) == 3 else "The same noise."
    groups = []
    if pictures:
        how = "strips" if len(work.data.shape) == 3 else "panels"
        groups.append(
            Group([*pictures], how=how, note=f"{note} The real rows belong to no noise. Lower distances are better.")
        )
    return Section("", text, groups, headlines=headlines, alerts=alerts, subtitle=subtitle(work))


def subtitle(work: Workspace) -> str:
    """What this page is about, for somebody who was sent it."""
    run = work.run
    steps = f"{' or '.join(map(str, run.eval.steps))} step{'s' * (max(run.eval.steps) > 1)}"
    control = ", with and without mid-training" * bool(run.control)
    what = DATA.get(run.data.kind, run.data.kind)
    return f"A diffusion model of {what}, made into a generator of {steps}{control}. CMT-Fast, {work.parameters:,} parameters."


def headline(stands: dict[str, Standing], quality: Quality, k: int) -> tuple[str, str]:
    """One plain sentence with the ratio and its uncertainty; then the second space, mid-training alone and the floor."""
    post, control, mid = (quality.of(k).get(name) for name in ("post", "control", "mid"))
    first, what = (
        post or mid,
        f"{quality.names.distance} distance" if quality.names.distance == "Fréchet" else quality.names.distance,
    )
    if not first:
        return "", ""
    line = f"In {words.steps(k)}, {'post-training after ' * bool(post)}mid-training reaches the {what} "
    line += verdict.text(verdict.distance(first, "frechet"))
    more, over = [], verdict.ratio(post, control, "frechet")
    if over and control:
        without = verdict.text(verdict.distance(control, "frechet"))
        line += f", post-training alone {without}: {verdict.text(over)} times the distance, {_images(stands)}"
        if second := verdict.ratio(post, control, "frechet_2"):
            more.append(f"In the second feature space: {verdict.text(second)} times.")
    if mid and (before := verdict.ratio(post, mid, "frechet")):
        more.append(f"Mid-training alone: {mid['frechet']:.3g}; post / mid is {verdict.text(before)}.")
    if quality.floor:
        more.append(f"Real rows against real rows: {quality.floor['frechet']:.3g}.")
    return f"{line}.", " ".join(more)


def _images(stands: dict[str, Standing]) -> str:
    a, b = (stands[name].path[1] for name in ("post", "control"))
    if a == b:
        return f"after as many student images ({a:,})"
    return f"after {a:,} student images against {b:,}"


def about(work: Workspace, stands: dict[str, Standing]) -> str:
    """One sentence on the run."""
    run, shape = work.run, " x ".join(map(str, work.data.shape))
    kinds = {name: s.objective for name, s in stands.items()}
    begun = f"pre-trained as a diffusion model ({kinds['pre']}, path {run.path})" if run.pre else f"on path {run.path}"
    what = (
        f"A network ({run.model.kind}, {work.parameters:,} parameters) for {DATA.get(run.data.kind, run.data.kind)} "
        f"({work.data.n:,} of {shape}): {begun}, mid-trained ({kinds['mid']}, teacher {run.mid.teacher or 'cached'}) "
        f"and post-trained ({kinds['post']}) into a generator of {' or '.join(map(str, run.eval.steps))} steps"
    )
    if run.control:
        begins = "straight from the pre-trained network" if run.control.start else "from nothing"
        what += f"; the control is post-trained ({kinds['control']}) {begins}"
    return f"{what}."


# ---------------------------------------------------------------------------------------------- tables

PLAIN = {"sliced_wasserstein": "sliced Wasserstein"}


def table(run: Run, done: dict[str, Standing], quality: Quality, k: int) -> Table:
    """What every network makes in k steps, between the floor and the teacher's many; then the ratios."""
    judged, n, entries = quality.judged, run.sampler.teacher_steps, []
    if quality.floor:
        entries.append((FLOOR, "", DASH, quality.floor))
        if quality.floor.get("unseen"):
            entries.append((UNSEEN, "", DASH, quality.floor["unseen"]))
    if "pre" in judged:
        entries.append((f"teacher, {words.steps(n)}", "pre", "0", judged["pre"].figures(n, "solver")))
    for name, s in done.items():
        if name in judged:
            path, nimg = s.path
            entries.append((TITLES.get(name, name), path, f"{nimg:,}", judged[name].figures(k)))
    columns = _columns(quality, [f for *_, f in entries if f])
    rows = [[title, *_cells(f, columns), nimg, path] for title, path, nimg, f in entries]
    ratios = _ratios(done, quality.of(k), columns)
    note = _notes(quality, columns, [title for title, *_ in entries])
    return Table(
        words.steps(k),
        ["network", *columns.values(), "student images", "path"],
        rows + ratios,
        note,
        strong=len(ratios),
    )


def _columns(quality: Quality, figures: list[Figures]) -> dict[str, str]:
    """Keys of the figures that anybody has, and what they are called: a distance comes first, accuracy after everything else."""
    names = {
        "frechet": f"{quality.names.distance}, {quality.names.first}",
        "frechet_2": f"Fréchet, {quality.names.second}",
        "sharpness": "sharpness",
        "precision": "precision, recall",
        "precision_2": "precision, recall, second space",
        **PLAIN,
        "accuracy": "accuracy",
    }
    return {key: title for key, title in names.items() if any(key in f for f in figures)}


def _cells(f: Figures | None, columns: dict[str, str]) -> list[str]:
    if not f:
        return ["not finite" for _ in columns]
    out = []
    for key in columns:
        if key not in f:
            out.append(DASH)
        elif key in verdict.SPACES:
            out.append(verdict.text(verdict.distance(f, key)))
        elif key.startswith("precision"):
            out.append(f"{f[key]:.2f}, {f[key.replace('precision', 'recall')]:.2f}")
        else:
            out.append(number(f[key], {"accuracy": ".1%", "sharpness": ".3f"}.get(key, ".4g")))
    return out


def _ratios(done: dict[str, Standing], figures: dict[str, Figures | None], columns: dict[str, str]) -> list[list[str]]:
    """Rows of post over control and post over mid: distances and images; other measures have no ratio that means anything."""
    rows = []
    for a, b in verdict.PAIRS:
        x, y = figures.get(a), figures.get(b)
        if not x or not y or a not in done or b not in done:
            continue
        cells = []
        for key in columns:
            of = verdict.ratio(x, y, key) if key in (*verdict.SPACES, *PLAIN) else None
            cells.append(verdict.text(of) if of else DASH)
        images = [done[name].path[1] for name in (a, b)]
        rows.append([f"{a} / {b}", *cells, number(images[0] / images[1], ".3g") if images[1] else DASH, ""])
    return rows


def _notes(quality: Quality, columns: dict[str, str], rows: list[str]) -> str:
    said = ["In brackets: the 95 % interval of other samples of the same networks, not of other seeds of training."]
    if FLOOR in rows:
        said.append("Floor: as many real rows, drawn again and again, as a network that knows them by heart would.")
    if UNSEEN in rows:
        said.append(
            "Unseen: what a perfect generator of new rows would get, from how far two halves of the data are apart."
        )
    if quality.real is not None and "sharpness" in columns:
        said.append(
            f"Sharpness: the share of energy in high frequencies; real rows have {quality.real:.3f}, the nearer the better."
        )
    return " ".join(said)


def summary(run: Run, tables: list[Table], names: Names) -> Table:
    """The quality tables as one for the terminal: both distances and accuracy by number of steps, without intervals."""
    heads = [title.partition(",")[0] for title in tables[0].head]
    wanted = {1: heads[1]} if len(heads) > 1 else {}
    for i, full in enumerate(tables[0].head[1:-2], 1):
        if full == f"Fréchet, {names.second}":
            wanted[i] = "second"
        elif heads[i] == "accuracy":
            wanted[i] = "accuracy"
    columns = ["network", "images", *(f"{title} @{k}" for k in run.eval.steps for title in wanted.values())]
    rows = []
    for title, *_, nimg, _ in tables[0].rows:
        found = [next((row for row in t.rows if row[0] == title), [DASH] * len(heads)) for t in tables]
        rows.append([title, nimg, *(row[i].partition(" [")[0] for row in found for i in wanted)])
    return Table(f"{heads[1]}: {names.first}; second: {names.second}; @k: in k steps", columns, rows)


def section(work: Workspace, quality: Quality, tables: list[Table], caution: str = "") -> Section:
    """The tables with and without mid-training, and in what post-training and control differ besides."""
    run, e = work.run, work.run.eval
    steered = getattr(run.model, "conditional", True)
    note = f" {caution.capitalize()}." if caution else ""
    text = (
        f"Each network draws {e.n:,} samples with its EMA weights, from the same noise and labels (seed {e.seed}). "
        f"Labels: {work.setting.law.text() if steered else 'the network takes none'}.{note} "
        "Student images: images seen after pre-training, summed along the path. Lower distances are better. "
        f"The teacher is the pre-trained network through the ODE solver ({run.sampler.solver}); the row `pre-trained` is "
        "the same network as a generator of few steps."
    )
    groups = [Group([*tables], wide=True)]
    if run.control:
        tree = loading.dump(run)
        rows = [row for row in differences(tree["post"], tree["control"]) if not row[0].endswith("_every_nimg")]
        said = "The control has settings of its own; it is not post-training with one thing left out."
        groups.append(Group([Table("Settings that differ", ["key", "post", "control"], rows, said, TEXT)], wide=True))
    return Section("Quality, with and without mid-training", [text], groups if tables else groups[1:])


def plain(figures: dict[str, Any] | None) -> dict[str, float] | None:
    """Figures without `left_out`, as figures.json has them."""
    return None if figures is None else {k: v for k, v in figures.items() if k != "left_out"}
