"""A run as one page: RUN/report.html (self-contained) and RUN/report.md, with and without mid-training side by side.

This file gathers the facts, `quality` and `sections` say them. Finished networks are judged once (judged.py). Without judging the
page is drawn at any moment from what is there, in seconds: that is what is looked at while a run trains.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import kept
from cmt_fast.render import templates
from cmt_fast.report import judged as judged_
from cmt_fast.report import quality as quality_
from cmt_fast.report import scales, sections
from cmt_fast.report.figures import Curve, Names
from cmt_fast.report.quality import Quality
from cmt_fast.run import standing
from cmt_fast.run.folder import about_run, stored_run
from cmt_fast.run.standing import Standing
from cmt_fast.run.workspace import Workspace, open_run
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint, files, sound
from cmt_fast.storage.metrics_log import METRICS
from cmt_fast.teacher import solver_record
from cmt_fast.train import solver_choice


def write(
    folder: Path, judge: bool = True, refresh_s: int | None = None, out: Path | None = None, training: bool = False
) -> dict[str, Any]:
    """Judge what is finished, on all ranks together, and write the report on the first. Returns figures and paths.

    judge=False: no network is called and no other rank waited for; the page says what is known so far, also of a run that has
    no finished stage, and how far it is. refresh_s: the page asks the browser to load it again every so many seconds.
    out: the folder for all that is written, in the place of the run's. training: the run's heart beats while it is judged.
    Raises ConfigError when `folder` is no run, holds no finished stage to judge, or matplotlib is not installed, and where
    nothing can be written.
    """
    run, home, about = stored_run(folder), _writable(folder, out), about_run(folder)
    # half-way neither the data, a checkpoint's tensors nor a GPU are touched: manifests and sizes of files are enough
    work = open_run(folder, device=None if judge else torch.device("cpu"))
    work.judging.alive = folder if training else None
    stands, done = standings(work)
    if judge and not done:
        states = "; ".join(f"{name}: {s.told}" for name, s in stands.items())
        raise ConfigError(f"RUN: {str(folder)!r} holds no finished stage to report on ({states})")
    try:
        quality, floor, caution = _judged(work, done, home) if judge else _known(work, done, home)
    except checkpoint.Damaged as error:  # which is passed over from now on
        print(f"checkpoint passed over: {error}", file=sys.stderr)
        return write(folder, judge, refresh_s, out, training)
    if judge and distributed.rank():
        return {}
    if judge:
        tell_lost(stands)
    curves = {k: {name: p for name in stands if (p := points(stands, name, k))} for k in run.eval.steps}
    reached = [row for k, lines in curves.items() for row in reach_rows(k, lines, done)]
    tables = [quality_.table(run, done, quality, k) for k in run.eval.steps] if quality.judged else []
    page = [
        quality_.first(work, stands, quality, judged_.pictures(work, stands, quality, home)),
        quality_.section(work, quality, tables, caution),
        scales.section(stands, quality.names),
        sections.curves(work, quality.judged, curves, reached, floor),
        sections.training(stands),
        sections.bill(stands),
        sections.solvers(chosen(work)),
        sections.samples(stands),
        *(
            [sections.theory(theory(folder, home))]
            if run.data.kind == "gmm" and (judge or _measured(folder, home))
            else []
        ),
        sections.surroundings(work, about),
    ]
    page = [page[0], *(section for section in page[1:] if section.groups)]
    html, markdown = _put(home, run.name, page, "" if judge else _banner(stands, quality), refresh_s)
    if judge:
        _say(page[0], [quality_.summary(run, tables, quality.names)] if tables else [])
        if reached:
            templates.show(sections.reach_table(reached, run.eval.n_during))
        progress.say(str(html))
    figures = {name: j._asdict() for name, j in quality.judged.items()}
    return {
        "run": run.name, "extractor": quality.names.first, "second": quality.names.second, "quality": figures,
        "floor": quality_.plain(quality.floor), "disagreements": page[0].alerts, "reach": reached, "html": html,
        "markdown": markdown,
    }  # fmt: skip


def tell_lost(stands: dict[str, Standing]) -> None:
    """Say which rows of metrics are damaged: those long before a checkpoint are read by nobody else on the way."""
    for s in stands.values():
        if s.record and s.record.lost:
            print(f"{s.folder / METRICS}: {sections.lost(s.record)}", file=sys.stderr)


def _writable(folder: Path, out: Path | None) -> Path:
    """Where the page goes. Raises ConfigError where nothing can be written: said before anything is judged."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("cmt report: draws with matplotlib, which is not installed: pip install matplotlib")
    if out is None and not os.access(folder, os.W_OK):
        raise ConfigError(f"RUN: {str(folder)!r} cannot be written to; --out FOLDER puts the page elsewhere")
    if out is not None and distributed.rank() == 0:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {str(out)!r} cannot be a folder of the page ({error.strerror})") from None
        if not os.access(out, os.W_OK):
            raise ConfigError(f"--out: {str(out)!r} cannot be written to")
    return out or folder


def _put(home: Path, name: str, page: list[templates.Section], banner: str, refresh_s: int | None) -> tuple[Path, Path]:
    """Write the page and its pictures; the paths of report.html and report.md."""
    html, markdown, pictures = home / "report.html", home / "report.md", home / "report"
    pictures.mkdir(exist_ok=True)
    for file, data in templates.pictures(page).items():
        files.write_bytes(pictures / file, data)
    files.write_text(html, templates.html(name, page, banner, refresh_s))
    files.write_text(markdown, templates.markdown(name, page, banner))
    return html, markdown


def _say(first: templates.Section, tables: list[templates.Table]) -> None:
    """The result on the terminal: the table, the sentence of it, and what contradicts it."""
    for table in tables:
        templates.show(table)
    for line in first.headlines:
        progress.say(" ".join(line))
    for line in first.alerts:
        progress.say(f"! {line}")


def _judged(work: Workspace, done: dict[str, Standing], home: Path) -> tuple[Quality, float | None, str]:
    """Quality, the floor at as many samples as are judged in training, and what is to be known of the number of samples."""
    e, judge = work.run.eval, work.judging.thorough
    judged = {name: judged_.judge(work, s, home) for name, s in done.items()}
    floor, during = (work.judging.floor(judge, n) for n in (e.n, e.n_during))
    assert judge.kept is not None
    if distributed.rank() == 0:
        judged_.draw_real(work, home)
    title = judge.title(e.n)
    names = Names(judge.name, judge.kept.about["second"], "Fréchet" if title.startswith("frechet") else title)
    caution = work.judging.about(e.n).get("note", "")
    return Quality(judged, names, floor, judge.kept.sharpness), during and during["frechet"], caution


def _known(work: Workspace, done: dict[str, Standing], home: Path) -> tuple[Quality, float | None, str]:
    """The same as far as files say it: nothing is computed, no judge is opened."""
    found = {name: k for name, s in done.items() if (k := judged_.known(work, s, home))}
    key = next((key for _, key in found.values()), {})
    asked = {"extractor": key["extractor"], "labels": work.setting.law.text()} if key else None
    real = next((k for f in (work.folder, work.parents) if asked and (k := kept.read(f, asked))), None)
    floors = real.about["floor"] if real is not None else {}
    floor, during = (floors.get(str(n)) for n in (work.run.eval.n, work.run.eval.n_during))
    names = Names(key.get("extractor", ""), key.get("second", ""), "Fréchet")
    quality = Quality({n: j for n, (j, _) in found.items()}, names, floor, real.sharpness if real is not None else None)
    return quality, during and during["frechet"], ""


def _banner(stands: dict[str, Standing], quality: Quality) -> str:
    """How far a run is, and when that was."""
    now = datetime.datetime.now(datetime.timezone.utc)
    parts = []
    for s in stands.values():
        parts.append(f"{s.name} {s.state}" + f" of {s.stage.images_nimg:,} images" * (s.nimg > 0 and not s.done))
    unjudged = [s.name for s in stands.values() if s.done and s.name not in quality.judged]
    text = f"As of {now:%Y-%m-%d %H:%M:%S} UTC: {', '.join(parts)}."
    return text + f" Not judged yet: {', '.join(unjudged)}; `cmt report` judges what is finished." * bool(unjudged)


def _measured(*folders: Path) -> bool:
    return any((folder / "theory.json").is_file() for folder in folders)


def stand(work: Workspace, name: str) -> Standing:
    """The stage as it is in the run's folder, or where its parents are."""
    return standing.of(work.run, work.folder, work.parents, name)


def standings(work: Workspace) -> tuple[dict[str, Standing], dict[str, Standing]]:
    """The stages as they are in the run's folder, or where its parents are, and those that are finished."""
    stands = {name: stand(work, name) for name in work.run.stages}
    return stands, {name: s for name, s in stands.items() if s.done}


def chosen(work: Workspace) -> dict[str, tuple[solver_record.Kept, list[str]]]:
    """What `nfe: auto` of each stage was settled to, and its summary."""
    kept = {name: solver_record.read(work.stage_dir(name)) for name in work.run.stages}
    return {name: (k, solver_choice.summary(name, k)) for name, k in kept.items() if k}


def points(stands: dict[str, Standing], name: str, k: int) -> Curve:
    """Distance at the evaluations of a student's stage against the images along its path, parents' images first."""
    before, parent = 0, stands[name].stage.start
    while parent in stands and parent != "pre":
        manifest = stands[parent].manifest
        before += manifest["nimg"] if manifest else 0
        parent = stands[parent].stage.start
    rows = ((before + row["nimg"], row["steps"].get(str(k))) for row in stands[name].evaluations)
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


def reach_rows(k: int, lines: dict[str, Curve], done: dict[str, Standing]) -> list[dict[str, Any]]:
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


def theory(folder: Path, home: Path) -> dict[str, Any]:
    """Solver order and gradient bias, measured once and kept in RUN/theory.json, or where the page goes."""
    from cmt_fast.evaluation import theory as bench

    file = next((f for f in (folder / "theory.json", home / "theory.json") if f.is_file()), home / "theory.json")
    for again in range(2):
        try:
            figures = sound.read(file)
            return {**figures, "text": bench.as_text(figures)}
        except FileNotFoundError:
            pass
        except (sound.Unsound, KeyError, TypeError, ValueError, AttributeError) as error:
            if again:
                raise
            sound.aside(file, f"{getattr(error, 'why', 'is no record of it')}, it is measured anew")
            file = home / "theory.json"
        progress.say("measuring solver order and gradient bias")
        files.write_text(file, sound.signed(bench.measure()))
    raise AssertionError("just written")
