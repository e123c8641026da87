"""Networks are judged once: figures stay in RUN/<stage>/figures.json, pictures beside them.

figures.json, for others to read:

    {"key": {"ema": ..., "extractor": ..., "second": ..., "eval": {...}, ...},   what the figures are of
     "few": {"1": {...}, "2": {...}},        by number of steps, as a few-step generator; null: not finite
     "solver": {"16": {...}},                of `pre` by the ODE solver; "during": the same on eval.n_during samples
     "left_out": {"few": {"1": {"frechet": [...], ...}}, "solver": {...}}}       for intervals (evaluation/intervals.py)

The figures of one number of steps are plain numbers: frechet, sliced_wasserstein, accuracy, frechet_2, sharpness, precision,
recall, precision_2, recall_2 (evaluation/measures.py), each where it can be had. Figures of real rows, the floor, are in
RUN/reference/*.json. A key that differs in anything makes all of them anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cmt_fast.config import loading
from cmt_fast.evaluation import kept
from cmt_fast.render import grids
from cmt_fast.render.templates import Picture, png
from cmt_fast.report.figures import FIGURES, Judged, checked, stored
from cmt_fast.report.quality import TITLES, Quality
from cmt_fast.run.standing import Standing
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress, words
from cmt_fast.storage import files, sound

MEASURES = 2  # version of what is measured
SHOWN, REAL = "shown", "shown.png"


def judge(work: Workspace, s: Standing, home: Path) -> Judged:
    """Figures of a finished stage, from its figures.json where that still holds; of `pre` by the solver too. Every rank.

    home: the folder that STAGE/figures.json is written to, the run's own or that of the page.
    """
    run, file, key = work.run, home / s.name / FIGURES, _key(work, s)
    every = (stored(place / FIGURES) for place in _places(work, s.name, home))
    if distributed.rank() == 0:
        _put_aside(work, s.name, home)
    there = next((found[1] for found in every if found and found[0] == key), None)
    everywhere = distributed.smallest(int(there is not None))  # a shared disk may show them to some ranks alone
    if there is not None and everywhere:
        return there
    if distributed.rank() == 0:
        progress.say(f"judging {s.name}: {run.eval.n:,} samples at {', '.join(map(str, run.eval.steps))} steps")
    assert s.manifest is not None
    with work.judging.going_on(s.name, s.manifest):
        judged, net = _figures(work, s)
        distributed.barrier()  # no rank finds the file before all have looked for it
        if distributed.rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            _draw(work, net, s.name, file.parent)
            files.write_text(file, sound.signed({"stage": s.name, "key": key, **judged._asdict()}))
    return judged


def _put_aside(work: Workspace, name: str, home: Path) -> None:
    """Damaged figures of this run get another name: they are made anew."""
    for place in {home / name, work.folder / name}:
        try:
            checked(place / FIGURES)
        except sound.Unsound as error:
            sound.aside(error.file, f"{error.why}, its figures are made anew")
        except OSError:
            pass


def _figures(work: Workspace, s: Standing) -> tuple[Judged, Any]:
    """All figures of a finished stage, and its network."""
    run, net = work.run, work.network(s.name, together=True)

    def figures(steps: tuple[int, ...], counts: tuple[int, ...], solver: bool) -> list[dict[str, dict | None]]:
        """{steps: figures} for each count; None where samples or figures are not finite."""
        found = work.judging.figures(net, steps, counts, solver, judge=work.judging.thorough) if steps else {}
        return [{str(k): _sound(of[n]) for k, of in found.items()} for n in counts]

    long = (run.sampler.teacher_steps,) if s.name == "pre" else ()
    (few,) = figures(run.eval.steps, (run.eval.n,), False)
    solver, during = figures(long, (run.eval.n, run.eval.n_during), True)
    out = {
        how: {k: f.pop("left_out", {}) for k, f in of.items() if f} for how, of in (("few", few), ("solver", solver))
    }
    for f in filter(None, during.values()):
        f.pop("left_out", None)
    return Judged(few, solver, during, out), net


def _places(work: Workspace, name: str, home: Path) -> list[Path]:
    """Where figures and pictures of a stage may be."""
    return list(dict.fromkeys((home / name, work.folder / name, work.stage_dir(name))))


def known(work: Workspace, s: Standing, home: Path) -> tuple[Judged, dict[str, Any]] | None:
    """Figures that are kept of these weights, whatever judged them, with their key; nothing is computed."""
    for folder in _places(work, s.name, home):
        found = stored(folder / FIGURES)
        if found and s.ema and found[0].get("ema") == s.ema and found[0].get("measures") == MEASURES:
            return found[1], found[0]
    return None


def _key(work: Workspace, s: Standing) -> dict[str, Any]:
    settings, judge = loading.dump(work.run), work.judging.thorough
    assert judge.kept is not None
    key = {k: settings[k] for k in ("data", "path", "sigma_data", "eval", "sampler")}
    key["data"] = {k: v for k, v in settings["data"].items() if k != "path"}
    key |= {"rows": work.data.facts, "ema": s.ema, "extractor": judge.name, "second": judge.kept.about["second"]}
    key["measures"] = MEASURES
    if work.run.eval.reference:
        key["reference"] = judge.kept.about["key"]["reference"]["xxh3_128"]
    return json.loads(json.dumps(key))


def _sound(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """None for figures of which a number is not finite."""
    numbers = [v for v in (figures or {}).values() if isinstance(v, float | int)]
    return figures if numbers and all(map(math.isfinite, numbers)) else None


# ---------------------------------------------------------------------------------------------- pictures


def _draw(work: Workspace, net: Any, name: str, folder: Path) -> None:
    """One sample of each class in the fewest steps, and the teacher's in many, from the same noise; on one rank."""
    run, n = work.run, kept.SHOWN if len(work.data.shape) == 3 else kept.POINTS
    setting, limit = work.setting.each_class(), _limit(work)
    ways = [(f"{SHOWN}-{run.eval.steps[0]}", run.eval.steps[0], False)]
    ways += [(f"{SHOWN}-solver", run.sampler.teacher_steps, True)] if name == "pre" else []
    for file, k, solver in ways:
        x = setting.generate(net, k, n, run.eval.seed, solver=solver)
        grids.strip(_flat(work.decoding.visible(x)[0]), folder / f"{file}.png", limit)


def draw_real(work: Workspace, home: Path) -> None:
    """The real rows that are kept, as a picture beside them; on one rank."""
    kept_, folder = work.judging.thorough.kept, home / kept.FOLDER
    if kept_ is not None and _real(work, home) is None:
        folder.mkdir(exist_ok=True)
        seen = work.decoding.visible(kept_.tensors["shown"].to(work.device))[0]
        grids.strip(_flat(seen), folder / REAL, _limit(work))


def _real(work: Workspace, home: Path) -> Path | None:
    """The picture of real rows, where there is one."""
    places = (folder / kept.FOLDER / REAL for folder in (home, work.folder, work.parents))
    return next((file for file in places if grids.whole(file)), None)


def _limit(work: Workspace) -> float:
    """Half the side of the square in which points are drawn, a little more than real ones need."""
    kept_ = work.judging.thorough.kept
    return 1.15 * float(kept_.tensors["shown"].abs().max()) if kept_ is not None and len(work.data.shape) == 1 else 2.0


def _flat(x: Any) -> Any:
    """Images as they are, of vectors the first two numbers."""
    return x if x.ndim == 4 else x[:, :2] if x.shape[1] > 1 else x.repeat(1, 2)


def pictures(work: Workspace, stands: dict[str, Standing], quality: Quality, home: Path) -> list[Picture]:
    """Real rows, the teacher, then every network in the fewest steps: those that were drawn."""
    k, out = work.run.eval.steps[0], []
    real = _real(work, home)
    if real:
        points = len(work.data.shape) == 1
        what = (
            f"{min(kept.POINTS, work.data.n):,} rows"
            if points
            else "one of each class"
            if work.data.classes
            else "rows"
        )
        out.append(png("real", "shown-real.png", real, what, "Real rows"))
    asked = [("pre", "teacher", work.run.sampler.teacher_steps, "solver")]
    asked += [(name, TITLES.get(name, name), k, "few") for name in stands]
    for name, title, steps, how in asked:
        judged = quality.judged.get(name)
        file = f"{SHOWN}-{'solver' if how == 'solver' else steps}.png"
        found = [f for w in _places(work, name, home) if grids.whole(f := w / file)]
        if judged is None or not found:
            continue
        figures = judged.figures(steps, how)
        found_ = f"{quality.names.distance} {figures['frechet']:.3g}" if figures else "not finite"
        note = f"{found_} in {words.steps(steps)}"
        alt = f"Samples of {title} in {words.steps(steps)}, from the same noise as in the other pictures"
        out.append(png(title, f"shown-{'teacher' if how == 'solver' else name}.png", found[0], note, alt))
    return out if len(out) > 1 else []
