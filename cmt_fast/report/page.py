"""A run as one page: RUN/report.html (self-contained) and RUN/report.md, with and without mid-training side by side.

This file gathers the facts, `templates.sections` says them. Networks are judged once: figures stay in
RUN/<stage>/figures.json under the checksum of the EMA weights, the judge's settings and the sampler, and are
taken from there while those are the same.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.render import templates
from cmt_fast.report import sections
from cmt_fast.report.standing import Curve, Judged, Stand
from cmt_fast.run.folder import RUN_FILE, stored_run
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint, files, metrics_log
from cmt_fast.teacher import solver_record
from cmt_fast.train import solver_choice
from cmt_fast.usage import ledger

FIGURES = "figures.json"


def write(folder: Path, judge: bool = True, refresh_s: int | None = None) -> dict[str, Any]:
    """Judge what is finished, on all ranks together, and write the report on the first. Returns figures and paths.

    judge: False draws what is there, on this rank alone, and says how far the run is; refresh_s: the page loads itself anew
    so often. Raises ConfigError when `folder` is no run, holds no finished stage, or matplotlib is not installed.
    """
    run = stored_run(folder)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("cmt report: draws with matplotlib, which is not installed: pip install matplotlib")
    about = json.loads((folder / RUN_FILE).read_text("utf-8"))
    work = Workspace(run, folder, Path(about["parents"]) if about.get("parents") else None, reading=True)
    stands = {name: stand(work, name) for name in run.stages}
    done = {name: s for name, s in stands.items() if s.done}
    if not judge:
        return _half_way(work, stands, about, refresh_s)
    if not done:
        states = "; ".join(f"{name}: {s.state}" for name, s in stands.items())
        raise ConfigError(f"RUN: {str(folder)!r} holds no finished stage to report on ({states})")
    judged = {name: judge_stage(work, s) for name, s in done.items()}
    if distributed.rank():
        return {}
    curves = {k: {name: p for name in stands if (p := points(stands, name, k))} for k in run.eval.steps}
    reached = [row for k, lines in curves.items() for row in reach_rows(k, lines, done)]
    tables = [sections.quality_table(work, done, judged, k) for k in run.eval.steps]
    page = [
        sections.head(work, stands, judged),
        sections.quality(work, tables),
        sections.curves(work, judged, curves, reached),
        sections.training(stands),
        sections.bill(stands),
        sections.solvers(chosen(work)),
        sections.samples(stands),
        *([sections.theory(theory(folder))] if run.data.kind == "gmm" else []),
        sections.surroundings(work, about),
    ]
    page = [section for section in page if section.groups]
    html, markdown = folder / "report.html", folder / "report.md"
    templates.write_pictures(folder / "report", page)
    files.write_text(html, templates.html(run.name, page))
    files.write_text(markdown, templates.markdown(run.name, page))
    templates.show(sections.summary(tables, run.eval.steps, work.judging.judge.name))
    if reached:
        templates.show(sections.reach_table(reached, run.eval.n_during))
    progress.say(str(html))
    figures = {name: j._asdict() for name, j in judged.items()}
    return {
        "run": run.name, "extractor": work.judging.judge.name, "quality": figures, "reach": reached, "html": html,
        "markdown": markdown,
    }  # fmt: skip


def _half_way(
    work: Workspace, stands: dict[str, Stand], about: dict[str, Any], refresh_s: int | None
) -> dict[str, Any]:
    """The page of a run that is under way: what needs no samples."""
    curves = {k: {name: p for name in stands if (p := points(stands, name, k))} for k in work.run.eval.steps}
    now = datetime.datetime.now(datetime.timezone.utc)
    page = [
        sections.head(work, stands, {}),
        sections.curves(work, {}, curves, []),
        sections.training(stands),
        sections.bill(stands),
        sections.samples(stands),
        sections.surroundings(work, about),
    ]
    page[0].text.append(f"{half_way(stands)}, updated {now:%H:%M} UTC")
    html = work.folder / "report.html"
    files.write_text(html, templates.html(work.run.name, [s for s in page if s.groups], refresh_s))
    return {"run": work.run.name, "html": html}


def half_way(stands: dict[str, Stand]) -> str:
    """Where a run that is not at its end stands, by its newest rows."""
    begun = [s for s in stands.values() if s.rows and not s.done]
    if not begun:
        return "between stages"
    s = begun[-1]
    return f"half-way: stage {s.name}, {100 * s.rows[-1]['nimg'] / s.stage.images_nimg:.0f} %"


def stand(work: Workspace, name: str) -> Stand:
    """The stage as it is in the run's folder, or where its parents are."""
    stage, folder = work.run.stages[name], work.stage_dir(name)
    manifest, done, state = None, False, "not trained"
    try:
        found = checkpoint.latest(folder)
    except checkpoint.CheckpointError:
        found, state = None, "damaged: none of its checkpoints is whole"
    if found:
        manifest, done = found.manifest, bool(found.manifest.get("done"))
        written = (found.folder / "manifest.json").stat().st_mtime
        when = datetime.datetime.fromtimestamp(written, datetime.timezone.utc)
        state = f"unfinished: {manifest['nimg']:,} of {stage.images_nimg:,} images"
        state = f"finished {when:%Y-%m-%d %H:%M} UTC" if done else state
    grids = sorted((folder / "grids").glob("[0-9]*.png"))
    rows = metrics_log.read(folder / metrics_log.METRICS)
    return Stand(name, stage, rows, manifest, done, state, grids, ledger.of_stage(folder, manifest))


def judge_stage(work: Workspace, s: Stand) -> Judged:
    """Figures of a finished stage, from its figures.json where that still holds; of `pre` by the solver too."""
    run, file, settings = work.run, work.folder / s.name / FIGURES, loading.dump(work.run)
    key = {k: settings[k] for k in ("data", "path", "sigma_data", "eval", "sampler")}
    key |= {"ema": s.ema, "extractor": work.judging.judge.name}
    if run.eval.reference:
        key["reference"] = files.checksum(Path(run.eval.reference))
    for known in (file, work.stage_dir(s.name) / FIGURES):
        try:
            stored = json.loads(known.read_text("utf-8"))
            if stored["key"] == key:
                return Judged(*(stored[kind] for kind in Judged._fields))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if distributed.rank() == 0:
        progress.say(f"judging {s.name}: {run.eval.n:,} samples at {', '.join(map(str, run.eval.steps))} steps")
    net = work.network(s.name)

    def figures(steps: tuple[int, ...], counts: tuple[int, ...], solver: bool) -> list[dict[str, dict | None]]:
        """{steps: figures} for each count; None where samples or figures are not finite."""
        found = work.judging.figures(net, steps, counts, solver) if steps else {}
        sound = lambda out: out if out and all(map(math.isfinite, out.values())) else None
        return [{str(k): sound(of[n]) for k, of in found.items()} for n in counts]

    long = (run.sampler.teacher_steps,) if s.name == "pre" else ()
    (few,) = figures(run.eval.steps, (run.eval.n,), False)
    judged = Judged(few, *figures(long, (run.eval.n, run.eval.n_during), True))
    distributed.barrier()  # no rank finds the file before all have looked for it
    if distributed.rank():
        return judged
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps({"key": key, **judged._asdict()}, indent=1))
    return judged


def chosen(work: Workspace) -> dict[str, tuple[solver_record.Kept, list[str]]]:
    """What `nfe: auto` of each stage was settled to, and its summary."""
    kept = {name: solver_record.read(work.stage_dir(name)) for name in work.run.stages}
    return {name: (k, solver_choice.summary(name, k)) for name, k in kept.items() if k}


def points(stands: dict[str, Stand], name: str, k: int) -> Curve:
    """Distance at the evaluations of a student's stage against the images along its path, parents' images first."""
    before, parent = 0, stands[name].stage.start
    while parent in stands and parent != "pre":
        manifest = stands[parent].manifest
        before += manifest["nimg"] if manifest else 0
        parent = stands[parent].stage.start
    rows = ((before + row["nimg"], row["steps"].get(str(k))) for row in stands[name].kind("eval"))
    return [(nimg, figures["frechet"]) for nimg, figures in rows if figures and name != "pre"]


def reach(curve: Curve, target: float) -> float | None:
    """Images at which a curve first is at `target` or below, log distance interpolated between; None: never."""
    before = None
    for nimg, distance in curve:
        if distance <= target:
            if before is None:
                return nimg
            high, low, goal = (math.log(max(x, 1e-12)) for x in (before[1], distance, target))
            return before[0] + (nimg - before[0]) * ((high - goal) / (high - low) if high > low else 1.0)
        before = (nimg, distance)
    return None


def reach_rows(k: int, lines: dict[str, Curve], done: dict[str, Stand]) -> list[dict[str, Any]]:
    """What finished mid- and post-training end at in k steps, and the images at which the control is that good."""
    out = []
    for name in ("mid", "post"):
        if name in done and name in lines and "control" in lines:
            nimg, distance = lines[name][-1]
            control = lines["control"]
            row = {
                "steps": k,
                "stage": name,
                "nimg": nimg,
                "frechet": distance,
                "control_nimg": reach(control, distance),
            }
            out.append({**row, "control_first": control[0][0], "control_last": control[-1][0]})
    return out


def theory(folder: Path) -> dict[str, Any]:
    """Solver order and gradient bias, measured once and kept in RUN/theory.json."""
    from cmt_fast.evaluation import theory as bench

    file = folder / "theory.json"
    if not file.is_file():
        progress.say("measuring solver order and gradient bias")
        files.write_text(file, json.dumps(bench.measure(), indent=1))
    figures = json.loads(file.read_text("utf-8"))
    return {**figures, "text": bench.as_text(figures)}
