"""Runs as tables for the terminal and as JSON: the list, one run, two runs side by side."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.recipes import recipes
from cmt_fast.render import grids
from cmt_fast.render.templates import Table
from cmt_fast.report import verdict
from cmt_fast.report.runs import Known, Newest
from cmt_fast.report.text import TEXT, differences
from cmt_fast.run.standing import Standing
from cmt_fast.runtime import words
from cmt_fast.runtime.words import DASH, number
from cmt_fast.storage import pruning

MEASURES = {"frechet": "Fréchet", "frechet_2": "second space", "accuracy": "accuracy"}
IN_TRAINING = "* by an evaluation in training, of fewer samples; `cmt report RUN` judges what is finished"
STATES = {
    "new": "not begun",
    "quiet": "no sign of life",
    "lost": "no sign of life",
    "ahead": "clock ahead",
}  # of a life, where its word alone says too little
NAMES = {"frechet": "", "fid": "FID ", "fd_dinov2": "FD-DINOv2 "}


def when(changed: float) -> str:
    """A time in UTC, to the second."""
    moment = datetime.datetime.fromtimestamp(changed, datetime.timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def state(known: Known) -> str:
    """Whether it is finished, alive or neither, in a word or two."""
    alive = known.life.word == "alive"
    return f"alive {words.about(known.life.age_s)} ago" if alive else STATES.get(known.life.word, known.life.word)


def stages_text(known: Known) -> str:
    """`pre mid 40 %`: what is finished by its name, what is not with how far it is; in brackets what another run trained."""
    out = []
    for s in known.stages.values():
        text = s.name if s.done else "" if s.state == "not begun" else f"{s.name} {s.state.partition(':')[0]}"
        out.append(text if s.own or not text else f"({text})")
    return " ".join(filter(None, out)) or "none"


def figures_text(known: Known) -> str:
    """`post 0.24 @1, 0.25 @2`: the distance of its furthest stage by number of steps."""
    name = known.last
    if name is None:
        return DASH
    figures = known.figures[name]
    metric = figures.key.get("eval", {}).get("metric", known.run.eval.metric)
    return f"{name} {NAMES.get(metric, metric)}{_by_steps(figures)}"


def _by_steps(figures: Newest) -> str:
    """`0.24 @1, 0.25 @2`, with a star where they are of an evaluation in training."""
    parts = [f"{number((of or {}).get('frechet'), '.3g')} @{k}" for k, of in figures.steps.items()]
    return ", ".join(parts) + " *" * (not figures.final)


SORTS = {
    "name": lambda known: str(known.folder),
    "changed": lambda known: -known.changed,
    "size": lambda known: -known.bytes,
    "hours": lambda known: -sum(known.hours.values()),
}


def listing(runs: list[Known], root: Path) -> Table:
    """Every run in a line."""
    rows = []
    for k in runs:
        name = str(k.folder.relative_to(root)) if k.folder != root else str(root)
        own = [name, k.run.name, stages_text(k), state(k), figures_text(k)]
        rows.append([*own, f"{k.images:,}", words.device_hours(k.hours), words.size(k.bytes)])
        rows[-1].append(f"{words.about(time.time() - k.changed)} ago")
    head = ["run", "recipe", "stages", "state", "Fréchet @ steps", "images", "hours", "size", "changed"]
    note = IN_TRAINING if any(row[4].endswith("*") for row in rows) else ""
    return Table(f"{len(runs)} run{'s' * (len(runs) != 1)} in {root}", head, rows, note, left=5)


def as_json(known: Known) -> dict[str, Any]:
    """The same as data, without settings."""
    stages = {}
    for s in known.stages.values():
        stages[s.name] = {
            "state": s.state, "done": s.done, "images": s.nimg, "of": s.stage.images_nimg, "folder": str(s.folder),
            "own": s.own, "ema": s.ema or None, "removed": sorted((s.manifest or {}).get("pruned", {})), "hours": s.hours,
            "figures": {**judged_by(known, f), "steps": f.steps} if (f := known.figures.get(s.name)) else None,
        }  # fmt: skip
    return {
        "run": str(known.folder), "recipe": known.run.name, "digest": fingerprint.digest(known.run), "state": state(known),
        "alive": known.life.word == "alive", "finished": known.life.word == "finished", "images": known.images,
        "hours": known.hours, "bytes": known.bytes, "changed": when(known.changed), "stages": stages,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ one run


def stages_table(known: Known) -> Table:
    """Every stage: how far, from what, its figures, its hours and bytes."""
    rows, left = [], False
    for s in known.stages.values():
        parent = (s.manifest or {}).get("parent")
        begun = f"{parent['stage']} @ {parent['nimg']:,}, {parent['ema'][:12]}" if parent else DASH
        found = known.figures.get(s.name)
        left = left or bool(found and not found.final)
        gone = ", ".join(n.removesuffix(".safetensors") for n in (s.manifest or {}).get("pruned", {}))
        how = f"{s.state}; {gone} removed" if gone else s.state
        how += "" if s.own else f", in {s.folder.parent}"
        figures, images = _by_steps(found) if found else DASH, f"{s.nimg:,} of {s.stage.images_nimg:,}"
        own = [s.name, s.objective, how, begun, s.ema[:12] or DASH, figures, images]
        rows.append([*own, words.device_hours(s.hours), words.size(pruning.size(s.folder))])
    head = [
        "stage",
        "objective",
        "state",
        "starts from (images, EMA)",
        "EMA",
        "Fréchet @ steps",
        "images",
        "hours",
        "size",
    ]
    return Table("Stages", head, rows, IN_TRAINING if left else "", left=6)


def settings_table(known: Known) -> Table:
    """Settings that differ from the recipe of its name as it comes with the package."""
    name = known.run.name
    if name not in recipes():
        return Table("", [], [], f"no recipe of the package is named {name!r}: its settings are in run.json")
    shipped = loading.dump(loading.load(name))
    rows = differences(shipped, loading.dump(known.run))
    note = "" if rows else f"settings: those of the recipe {name} as it comes with the package"
    return Table(f"Settings that differ from the recipe {name}", ["key", "recipe", "this run"], rows, note, TEXT)


def files_table(known: Known) -> Table:
    """What takes the space: parts of the run's folder, the largest first."""
    sizes: dict[str, int] = {}
    for path, stat in pruning.walk(known.folder):
        where = path.relative_to(known.folder).parts
        if "checkpoints" in where and where[1:2] == ("checkpoints",):
            part = f"checkpoints: {'EMA' if where[-1].startswith('ema-') else path.stem}"
        elif len(where) > 2 and where[0] in known.stages:
            part = f"{where[1]} of stages"
        else:
            part = f"{where[0]}/" if len(where) > 1 and where[0] not in known.stages else where[-1]
        sizes[part] = sizes.get(part, 0) + stat.st_size
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    rows = [[part, words.size(size)] for part, size in ordered[:12]]
    if len(ordered) > 12:
        rows.append([f"{len(ordered) - 12} more", words.size(sum(size for _, size in ordered[12:]))])
    return Table(f"Files, {words.size(known.bytes)}", ["what", "size"], rows)


# ------------------------------------------------------------------------------------------------ two runs


def judged_by(known: Known, figures: Newest) -> dict[str, Any]:
    """What must be equal for figures of two runs to be compared."""
    asked = figures.key.get("eval") or loading.dump(known.run)["eval"]
    rows = figures.key.get("rows") or known.about.get("data")
    file = asked.get("reference")
    return {
        "samples": figures.n,
        "metric": asked.get("metric"),
        "features": figures.key.get("extractor") or asked.get("metric"),
        "reference": figures.key.get("reference") or file or rows,
        "labels": asked.get("labels"),
        "judged": "by cmt report" if figures.final else "in training",
    }


def incomparable(a: Known, b: Known, name: str) -> list[str]:
    """Why the figures of a stage of two runs cannot be compared, empty where they can."""
    x, y = (r.figures.get(name) for r in (a, b))
    if not (x and y):
        return []
    left, right = judged_by(a, x), judged_by(b, y)
    short = lambda v: str(v) if not isinstance(v, dict) else "its own rows"
    out = []
    for key, mine in left.items():
        theirs = right[key]
        if mine != theirs:
            same = short(mine) == short(theirs)
            out.append(f"other {key}" if same else f"{key} {short(mine)} and {short(theirs)}")
    return out


def titles(a: Known, b: Known) -> tuple[str, str]:
    """What two runs are called side by side: their folders' names, or paths where those are equal."""
    x, y = a.folder.name, b.folder.name
    return (x, y) if x != y and x and y else (str(a.folder), str(b.folder))


def comparison(a: Known, b: Known) -> tuple[list[Table], list[str]]:
    """What was used, and figures of each stage side by side by number of steps; and why some cannot be compared, a line each."""
    names = titles(a, b)
    tables, said = [_used(a, b, names)], dict[str, None]()
    stages = list(dict.fromkeys([*a.stages, *b.stages]))
    steps = list(dict.fromkeys(k for r in (a, b) for f in r.figures.values() for k in f.steps))
    why = {name: incomparable(a, b, name) for name in stages}
    for name, reasons in why.items():
        if reasons:
            said[f"{name}: not comparable: {'; '.join(reasons)}"] = None
    for k in sorted(steps, key=int):
        found = {name: tuple(_of(r, name, k) for r in (a, b)) for name in stages}
        rows = [_row(name, *found[name], not why[name], _paired(a, b, name)) for name in stages if any(found[name])]
        for above, below in (("post", "control"), ("post", "mid")):
            if above in found and below in found:
                rows += _ratios(above, below, [(found[above][i], found[below][i]) for i in (0, 1)])
        head = ["stage", *(f"{t}: {run}" for t in MEASURES.values() for run in names)]
        head.insert(3, f"{names[1]} / {names[0]}")
        keep = [i for i in range(len(head)) if i == 0 or any(row[i] != DASH for row in rows)]
        tables.append(Table(words.steps(k), [head[i] for i in keep], [[row[i] for i in keep] for row in rows]))
    if any(not f.final for r in (a, b) for f in r.figures.values()):
        said[IN_TRAINING] = None
    return tables, list(said)


def _used(a: Known, b: Known, names: tuple[str, str]) -> Table:
    rows = [["state", *(state(r) for r in (a, b))], ["stages", *(stages_text(r) for r in (a, b))]]
    rows += [["images", *(f"{r.images:,}" for r in (a, b))], ["hours", *(words.device_hours(r.hours) for r in (a, b))]]
    rows += [["size", *(words.size(r.bytes) for r in (a, b))], ["changed", *(when(r.changed) for r in (a, b))]]
    surroundings = [r.about.get("environment") or {} for r in (a, b)]
    for key in dict.fromkeys(k for e in surroundings for k in e):
        both = [str(e.get(key, DASH)) for e in surroundings]
        if both[0] != both[1]:
            rows.append([key, *both])
    return Table("Runs", ["", *names], rows, left=TEXT)


def _of(known: Known, name: str, k: str) -> dict[str, Any] | None:
    figures = known.figures.get(name)
    found = figures.of(k) if figures else None
    return {**found, "final": figures.final} if found and figures else None


def _paired(a: Known, b: Known, name: str) -> bool:
    """Whether the samples of both are of the same noise, as an interval of their ratio takes them to be."""
    seeds = [r.figures[name].key.get("eval", {}).get("seed") for r in (a, b) if name in r.figures]
    return len(seeds) == 2 and seeds[0] == seeds[1]


def _row(name: str, x: dict | None, y: dict | None, comparable: bool, paired: bool) -> list[str]:
    cells = []
    for key in MEASURES:
        for of in (x, y):
            value = of.get(key) if of else None
            text = DASH if value is None else f"{value:.1%}" if key == "accuracy" else f"{value:.4g}"
            cells.append(text + " *" if of and value is not None and not of["final"] else text)
    over = DASH
    if comparable and x and y:
        bare = [{k: v for k, v in of.items() if paired or k != "left_out"} for of in (y, x)]
        found = verdict.ratio(bare[0], bare[1], "frechet")
        over = verdict.text(found) if found else DASH
    return [name, *cells[:2], over, *cells[2:]]


def _ratios(above: str, below: str, pairs: list[tuple[dict | None, dict | None]]) -> list[list[str]]:
    """One stage over another within each run, where both were judged alike."""
    texts = {}
    for key in ("frechet", "frechet_2"):
        alike = [(x, y) if x and y and x["final"] == y["final"] else (None, None) for x, y in pairs]
        found = [verdict.ratio(x, y, key) for x, y in alike]
        texts[key] = [verdict.text(r) if r else DASH for r in found]
    if all(t == DASH for of in texts.values() for t in of):
        return []
    return [[f"{above} / {below}", *texts["frechet"], DASH, *texts["frechet_2"], DASH, DASH]]


def settings_of(a: Known, b: Known) -> Table:
    """Settings in which two runs differ."""
    names = titles(a, b)
    rows = differences(loading.dump(a.run), loading.dump(b.run))
    note = "" if rows else "the settings are the same"
    return Table("Settings that differ", ["key", *names], rows, note, TEXT)


def draw(a: Known, b: Known, path: Path) -> int:
    """The last grids of each stage of both, side by side, as a PNG. Returns how many; writes nothing where there are none."""
    rows = []
    for name in dict.fromkeys([*a.stages, *b.stages]):
        both = [_grid(r.stages.get(name)) for r in (a, b)]
        if any(both):
            rows.append((name, both))
    if rows:
        grids.beside(titles(a, b), rows, path)
    return sum(picture is not None for _, both in rows for picture in both)


def _grid(s: Standing | None) -> tuple[Path, str] | None:
    """The newest grid of a stage and what stands under it."""
    if s is None:
        return None
    found = s.grids[-1:]
    return (found[0], f"{s.images(int(found[0].stem)):,} images") if found else None
