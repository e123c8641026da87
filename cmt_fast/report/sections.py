"""What each section of the report says: facts of a run in, tables and pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cmt_fast.config import loading
from cmt_fast.render import grids, plots, thin
from cmt_fast.render.templates import Group, Picture, Section, Table, png
from cmt_fast.report import events
from cmt_fast.report.figures import Curve, Judged
from cmt_fast.report.text import TEXT
from cmt_fast.run.standing import Standing
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import words
from cmt_fast.runtime.words import DASH, number
from cmt_fast.storage.record import Record
from cmt_fast.teacher import solver_record
from cmt_fast.usage.bills import PHASES, Amount

NO_WALL = {"train_s": 0.0, "eval_s": 0.0, "images_per_s": 0.0}  # of a row that does not say it
DATA = {
    "digits": "8 x 8 handwritten digits",
    "photos": "32 x 32 windows of six photographs",
    "gmm": "points of a 2-D Gaussian mixture",
    "npz": "images of a file",
    "latents": "rows of a store",
}


def lineage(stands: dict[str, Standing]) -> Table:
    """Every stage: what it starts from, checksums, how far it is."""
    rows = []
    for s in stands.values():
        m, parent = s.manifest or {}, DASH
        if m.get("parent"):
            p = m["parent"]
            anew = p["stage"] in stands and stands[p["stage"]].ema != p["ema"]
            parent = f"{p['stage']} @ {p['nimg']:,}, {p['ema'][:12]}" + " (retrained since)" * anew
        digest = m.get("config", DASH)[:12]
        rows.append(
            [
                s.name,
                s.objective,
                parent,
                number(m.get("nimg"), ","),
                s.ema[:12] or DASH,
                digest,
                s.told + _nonfinite(m),
            ]
        )
    columns = ["stage", "objective", "starts from (images, EMA)", "images", "EMA checksum", "config digest", "state"]
    return Table("Lineage", columns, rows, left=TEXT)


def _nonfinite(manifest: dict[str, Any]) -> str:
    """What became of steps that were not finite, from the lineage."""
    kept = manifest.get("nonfinite") or {}
    skipped, back = len(kept.get("skipped", ())), kept.get("rollbacks", ())
    text = f"; {skipped:,} step{'s' * (skipped > 1)} skipped, not finite" if skipped else ""
    return text + "".join(f"; rolled back from step {b['step']:,} to {b['from']:,}, other noise" for b in back)


def reach_table(reached: list[dict[str, Any]], n: int) -> Table:
    """How many images the control needs for what mid-training reaches; n: samples of each evaluation during training."""
    rows = []
    for r in reached:
        needed, last = r["control_nimg"], r["control_last"]
        if needed is None:
            text = f"not reached within {last:,} images"
            times = f"> {last / r['nimg']:.2f}" if last >= r["nimg"] else DASH
        elif needed > r["control_first"]:
            text, times = f"{round(needed):,}", f"{needed / r['nimg']:.2f}"
        else:
            text, times = f"at most {needed:,}, its first evaluation", f"<= {needed / r['nimg']:.2f}"
        own = [words.steps(r["steps"]), f"end of {r['stage']}", number(r["frechet"]), f"{r['nimg']:,}"]
        rows.append([*own, text, times])
    columns = ["samples in", "at the", "Fréchet", "its student images", "images the control needs", "ratio of images"]
    note = (
        "The first point at which the control is at least as good; log distance is interpolated linearly between "
        "evaluations. Images are not compute: teacher rollouts cost network calls too; see the seconds below."
    )
    title = f"Images the control needs to reach what mid-training reaches, by evaluations of {n:,} samples"
    return Table(title, columns, rows, note, left=2)


def curves(
    work: Workspace, judged: dict[str, Judged], lines: dict[int, dict[str, Curve]], reached: list[dict[str, Any]],
    floor: float | None = None,
) -> Section:  # fmt: skip
    """Fréchet distance against student images, one panel per number of steps. floor: of as many real rows."""
    run, figures, n = work.run, [], work.run.sampler.teacher_steps
    teacher = judged["pre"].during.get(str(n)) if "pre" in judged else None
    levels = [(f"teacher, {words.steps(n)}", teacher["frechet"])] if teacher else []
    levels += [("real rows (floor)", floor)] if floor else []
    for k, stages in lines.items():
        if stages:
            title = f"Samples in {words.steps(k)}: Fréchet distance by student images."
            figures.append(Picture(title, f"quality-{k}.svg", plots.quality(words.steps(k), stages, levels)))
    groups = [Group(figures)] if figures else []
    if reached:
        groups.append(Group([reach_table(reached, run.eval.n_during)], wide=True))
    text = (
        f"Judged during training, the dotted lines too, on {run.eval.n_during:,} samples; the tables above are on "
        f"{run.eval.n:,}, and distances fall with the number of samples. "
        "Post-training continues from the images of mid-training."
    )
    return Section("Quality by images", [text], groups)


def lost(record: Record) -> str:
    """What is said of rows that are not what was written."""
    many = record.lost > 1
    return f"{record.lost} row{'s' * many} of metrics.jsonl {'are' if many else 'is'} damaged and left out"


def training(stands: dict[str, Standing]) -> Section:
    """Losses, images, seconds of every stage that has begun."""
    rows, figures = [], []
    for s in stands.values():
        record, m = s.record, s.manifest
        if not (record and record.nimg):
            continue
        first, last = record.first, record.recent[-1]
        said = NO_WALL | last.get("wall", {})
        wall = NO_WALL | m.get("wall", {}) if m and m["step"] == last.get("step") else said  # it holds the last judging
        rate = [row.get("lr") or 0.0 for row in (first, last)]
        losses = [number(row.get("loss") or 0.0) for row in (first, last)] + [f"{rate[0]:.3g} to {rate[1]:.3g}"]
        judged_s = max([wall["eval_s"], *((row.get("wall") or {}).get("eval_s") or 0.0 for row in s.evaluations)])
        times = [f"{wall['train_s']:,.1f}", f"{judged_s:,.1f}", f"{said['images_per_s']:,.0f}"]
        rows.append([s.name, s.objective, f"{last['nimg']:,}", f"{s.stage.batch:,}", *losses, *times])
        loss, lr = (list(zip(*thin.extremes(record.nimg, column))) for column in (record.loss, record.lr))
        title = f"{s.name}: loss, and learning rate (dotted)."
        if (n := len(record.nimg)) > len(loss):
            title += f" {n:,} rows, drawn as the lowest and the highest of each {n / thin.BINS:,.0f}."
        if len(loss) > 1:  # half-way there may be one, which is no line
            figures.append(Picture(title, f"loss-{s.name}.svg", plots.loss(s.name, loss, lr)))
    columns = ["stage", "objective", "images", "batch", "first loss", "last loss", "learning rate"]
    columns += ["s training", "s judging", "images/s"]
    note = (
        "First and last loss are means over about a fiftieth of the stage. Losses of different objectives cannot be compared. "
        "Seconds of training include the teacher's rollouts; images/s count training alone."
    )
    damaged = [f"{s.name}: {lost(s.record)}." for s in stands.values() if s.record and s.record.lost]
    note = " ".join([note, *damaged])
    own = [Group([Table("", columns, rows, note, left=2)], wide=True), Group(figures)] if rows else []
    told = events.table(stands)
    more = [Group([told], wide=True)] if told else []
    return Section("Stages", [], [Group([lineage(stands)], wide=True), *more, *own])


def kwh(amount: Amount) -> str:
    """Energy as text: at least what was measured, where some of it is unknown."""
    if amount.kwh is not None or amount.joules is None:
        return number(amount.kwh)
    return f"at least {amount.joules / 3.6e6:.4g}"


def bill(stands: dict[str, Standing]) -> Section:
    """Device-hours of every stage by what they went into, energy, images an hour."""
    tables, text, reasons = [], [], set()
    for unit, title in words.UNITS.items():
        billed = [s for s in stands.values() if s.bill and s.bill.amounts.get(unit)]
        used = [phase for phase in PHASES if any(phase in s.bill.amounts[unit] for s in billed)]
        rows, whole, by_phase = [], Amount(), dict.fromkeys(used, Amount())
        span, spans = (3600, "hours") if any(s.bill.total(unit).hours > 0.1 for s in billed) else (1, "seconds")
        for s in billed:
            own, total = s.bill.amounts[unit], s.bill.total(unit)
            whole = whole.plus(total)
            by_phase = {phase: by_phase[phase].plus(own.get(phase, Amount())) for phase in used}
            nimg = (s.manifest["nimg"] if s.manifest else 0) - s.bill.from_nimg
            rate = f"{nimg / total.hours:,.0f}" if total.hours and nimg > 0 else DASH
            parts = [number(own[phase].seconds / span) if phase in own else DASH for phase in used]
            rows.append([s.name, number(total.seconds / span), *parts, kwh(total), rate])
            if s.bill.from_nimg:
                text.append(
                    f"The usage of {s.name} begins at {s.bill.from_nimg:,} images: usage before that is unknown."
                )
            if total.unmeasured_s:
                reasons.add(s.bill.reason or "a process was killed, and its last usage is unknown")
        if not rows:
            continue
        shares = [number(amount.hours / whole.hours if whole.hours else None, ".1%") for amount in by_phase.values()]
        energy = [kwh(amount) for amount in by_phase.values()]
        if whole.joules is not None:
            rows.append(["kWh", "", *energy, "", ""])
        rows.append(["all", number(whole.seconds / span), *shares, kwh(whole), ""])
        columns = ["stage", f"{title}-{spans}", *used, "kWh", f"images per {title}-hour"]
        tables.append(Table("", columns, rows, strong=1))
    if not tables:
        return Section("Usage", [], [])
    text.insert(0, (
        "Time for which a device was held, over all processes and restarts. Stalled: waiting for "
        "rows, and work lost to kills. Start-up includes compilation. Judging by `cmt report` is not included."
    ))  # fmt: skip
    text += [f"Energy is unknown in part: {reason}." for reason in sorted(reasons)]
    return Section("Usage", text, [Group([*tables], wide=True)])


def solvers(chosen: dict[str, tuple[solver_record.Kept, list[str]]]) -> Section:
    """The tables by which `nfe: auto` was settled."""
    text, tables = [], []
    for name, (kept, lines) in chosen.items():
        text += [f"{name}: {line}." for line in lines]
        rows = [[*solver_record.cells(row), solver_record.serves(row, kept.limit)] for row in kept.rows]
        note = "RMS per dimension, from step doubling. An order in brackets was not used to extrapolate."
        tables.append(Table(f"{name}: endpoint error", [*solver_record.HEAD, "serves"], rows, note))
        if kept.worth and kept.worth["rule"] == "bias":
            weighed = [[*solver_record.cells(row)[:3], *solver_record.worth_cells(row)] for row in kept.rows]
            note = "What a budget of forwards leaves of the bound on the gradient's bias. Epsilon and bound are mean squares."
            head = [*solver_record.HEAD[:3], *solver_record.WORTH_HEAD]
            tables.append(Table(f"{name}: bound on the bias", head, weighed, note))
    return Section("The teacher's solver", text, [Group(tables)] if tables else [])


def samples(stands: dict[str, Standing]) -> Section:
    """The last grid of every stage, and one stage over its training."""

    def picture(s: Standing, path: Path, which: str = "") -> Picture:
        return png(f"{s.name} at {s.images(int(path.stem)):,} images.", f"grid-{s.name}{which}.png", path)

    drawn = {name: [path for path in s.grids if grids.whole(path)] for name, s in stands.items()}
    last: list[Table | Picture] = [picture(s, drawn[name][-1]) for name, s in stands.items() if drawn[name]]
    groups, text = [Group(last)] if last else [], "Same noise and labels everywhere."
    story = next((stands[n] for n in ("mid", "post", "control") if n in stands and len(drawn[n]) > 2), None)
    if story:
        count, have = min(4, len(drawn[story.name])), len(drawn[story.name])
        chosen = [drawn[story.name][i * (have - 1) // (count - 1)] for i in range(count)]
        groups.append(Group([picture(story, path, f"-{i + 1}") for i, path in enumerate(chosen)]))
        text += f" First every stage at its end, then {story.name} during its training."
    return Section("Samples", [text], groups)


def theory(figures: dict[str, Any]) -> Section:
    """Solver order and gradient bias on a Gaussian mixture."""
    solver, bias = figures["solver"], figures["bias"]
    two = lambda slope: f"{round(slope, 2) + 0.0:.2f}"  # no -0.00
    errors = [[str(n), *(f"{rms[i]:.3g}" for rms in solver["rms"].values())] for i, n in enumerate(solver["nfe"])]
    errors.append(["slope", *(two(solver["slopes"][order]) for order in solver["rms"])])
    rows = [[name, r["swept"], r["expected"], two(r["slope_mse"]), two(r["slope_bias"])] for name, r in bias.items()]
    columns = ["target", "swept", "expected slopes", "slope of MSE", "slope of B"]
    table = Table("Solver error (RMS)", ["network calls", *(f"order {o}" for o in solver["rms"])], errors, strong=1)
    order = Picture("Error at the end of the path; dashed: fitted slopes.", "solver.svg", plots.solver_order(solver))
    drawn = [
        Picture(f"{title}, by what is swept.", f"{key}.svg", plots.bias(title, bias, key))
        for key, title in (("mse", "MSE of the target"), ("bias", "B, the gradient's bias"))
    ]
    text = (
        "Measured on a Gaussian mixture whose denoiser and flow map are known; slopes are fitted on log-log axes. MSE: the "
        "regression target's squared error. B: squared bias of the gradient that it gives."
    )
    groups = [Group([order, table]), Group([*drawn]), Group([Table("Gradient bias", columns, rows, left=3)], wide=True)]
    return Section("Theory, where the answer is known", [text], groups, "All figures as text", figures["text"])


def surroundings(work: Workspace, about: dict[str, Any]) -> Section:
    """Environment, ops and the resolved recipe."""
    row = lambda pairs: [[str(k), str(v)] for k, v in pairs.items()]
    tables = [
        Table("Machine and versions", ["what", "which"], row(about["environment"]), left=TEXT),
        Table("Ops", ["op", "backend"], row(about["ops"]), left=TEXT),
    ]
    recipe = yaml.safe_dump(loading.dump(work.run), sort_keys=False, allow_unicode=True)
    text = f"Config digest {about['digest']}."
    if about.get("parents"):
        text += f" Stages not trained here are from {about['parents']}."
    return Section("Environment and recipe", [text], [Group([*tables])], "The resolved recipe", recipe)
