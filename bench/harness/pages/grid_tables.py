"""The tables and sentences of docs/grid.md, from what `python -m bench grid` found. Losing rows come first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench.grid import judged, questions
from bench.grid.cells import ALONE, EQUAL, STARTS
from bench.grid.judged import MEASURES, OTHERS, SPACES, STEPS, Effect, Table

HEADS = {"frechet": "first space", "frechet_2": "second space"}
PICTURES = Path("docs/grid")
PLACES = (("1", "mid"), ("1", "post"), ("2", "post"))  # steps, and after which stage
TITLES = {"scratch": "from scratch", "pre": "from `pre`", "mid": "from `mid`", "anchored": "from `mid`, anchored"}
VERDICTS = {"nearer": "nearer in both spaces", "farther": "**farther** in both spaces or failed",
            "open": "not told apart in at least one space", "apart": "**the spaces contradict each other**"}  # fmt: skip


def table(results: Path, which: str) -> str:
    """which: SUITE, the verdict, or SUITE-ratios, -distances, -rates, -shared, -questions, -picture. results: of one device."""
    suite, _, part = which.partition("-")
    if part == "picture":
        there = (PICTURES / f"{suite}.png").is_file()
        return f"![{suite}: distances over those from pre, in one step](grid/{suite}.png)\n\n" if there else "\n"
    file = results / f"grid-{suite}.json"
    if not file.is_file():
        return f"Not measured yet: `python -m bench grid {suite}`.\n\n"
    data = json.loads(file.read_text("utf-8"))
    return {
        "": verdict,
        "ratios": ratios,
        "distances": distances,
        "rates": rates,
        "shared": shared,
        "questions": answers,
    }[part](data)


def steps(k: str) -> str:
    """`1 step`."""
    return f"{k} step{'s' * (k != '1')}"


def text(effect: Effect | None) -> str:
    """`0.35 [0.31, 0.39]`; one pair has no interval."""
    if effect is None:
        return ""
    if math.isinf(effect.high):
        return f"{effect.value:.3g}"
    bold = "**" * (effect.says == "farther")
    return f"{bold}{effect.value:.2g} [{effect.low:.2g}, {effect.high:.2g}]{bold}"


def ratios(data: dict[str, Any]) -> str:
    """Of every objective and start, at both equalities: distances over those from `pre`."""
    found = Table(data["rows"])
    out = []
    for equal in EQUAL:
        heads = [f"{HEADS[space]}, {steps(k)}" for k, space in MEASURES]
        out += [f"At equal {equal}, over the distance from `pre`:\n"]
        out += [
            f"| objective | start | {' | '.join(heads)} | teacher's share of forwards |",
            "|---|---|" + "---|" * (len(heads) + 1),
        ]
        lines = []
        for start in OTHERS:
            for name in found.names:
                cells = [found.effect(name, start, equal, k, space) for k, space in MEASURES]
                failed = found.failures(name, start, equal)
                if not any(cells) and not failed:
                    continue
                shown = " | ".join(text(c) or "failed" * bool(failed) for c in cells)
                note = f", {failed} seed{'s' * (failed > 1)} failed" if failed else ""
                line = f"| `{name}` | {TITLES[start]}{note} | {shown} | {share(found, name, start, equal)} |"
                lines.append((-failed, -found.mean(name, start, equal), line))
        out += [line for *_, line in sorted(lines)] + [""]
    return "\n".join([*out, _about(data, found)]) + "\n\n"


def share(found: Table, name: str, start: str, equal: str) -> str:
    """Of the counted forwards of a cell."""
    row = next((r for s in found.seeds if (r := found.row(name, start, equal, s))), None)
    if row is None:
        return ""
    return f"{row['forwards']['teacher'] / sum(row['forwards'].values()):.0%}"


def distances(data: dict[str, Any]) -> str:
    """Every cell: distances of all seeds, images, forwards, processor seconds."""
    found = Table(data["rows"])
    heads = [f"{HEADS[space]}, {steps(k)}" for k, space in MEASURES]
    lines = [
        f"| cell | learning rate | student images | forwards, thousands | {' | '.join(heads)} | CPU s |",
        "|---|---:|---:|---:|" + "---|" * len(heads) + "---:|",
    ]
    rows = []
    names = [*found.names, *sorted({f"{ALONE}@{p}" for p in found.path.values()} & set(found.path))]
    for name in names:
        for start in STARTS:
            for equal in EQUAL if start != "mid" else ("images",):
                own = [r for s in found.seeds if (r := found.row(name, start, equal, s))]
                if not own:
                    continue
                title = TITLES[start] if not name.startswith(f"{ALONE}@") else "mid-training alone"
                both = "images and forwards" if start == "mid" else equal
                cells = [" / ".join(_number(r, k, space) for r in own) for k, space in MEASURES]
                cpu = sum(sum(r["cpu_s"].values()) for r in own) / len(own)
                work = sum(own[0]["forwards"].values()) / 1000
                line = (
                    f"| `{name}` {title}, equal {both} | {own[0]['lr']:.2g} | {sum(own[0]['images'].values()):,} | {work:.0f} "
                    f"| {' | '.join(cells)} | {cpu:.0f} |"
                )
                rows.append((-_mean(own), line))
    lines += [line for _, line in sorted(rows)]
    return "\n".join([*lines, "", _about(data, found)]) + "\n\n"


def _number(row: dict[str, Any], k: str, space: str) -> str:
    return f"{row['steps'][k][space]:#.3g}".rstrip(".") if "steps" in row else "failed"


def _mean(rows: list[dict[str, Any]]) -> float:
    logs = [math.log(r["steps"][k][space]) for r in rows for k, space in MEASURES if "steps" in r]
    return sum(logs) / len(logs) if len(logs) == 4 * len(rows) else math.inf


def shared(data: dict[str, Any]) -> str:
    """The stages that cells begin from, the teacher by its solver, and the floor."""
    heads = [f"{HEADS[space]}, {steps(k)}" for k, space in MEASURES]
    lines = [f"| shared stage | {' | '.join(heads)} | CPU s |", "|---|" + "---|" * len(heads) + "---:|"]
    floor = data["floor"] or {}
    shown = [f"{floor[space]:#.3g}" if space in floor else "" for _, space in MEASURES]
    lines.append(f"| real images, drawn again: the floor | {' | '.join(shown)} | |")
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in data["shared"]:
        if row["seed"] < 100 and not row.get("arm"):
            groups.setdefault((row["path"], row["stage"], row["images"]), []).append(row)
    for (path, stage, images), rows in sorted(groups.items(), key=lambda kv: (kv[0][0], kv[0][1] != "pre", kv[0][2])):
        rows.sort(key=lambda r: r["seed"])
        cpu = sum(r["cpu_s"] for r in rows) / len(rows)
        if stage == "pre":
            calls = next((k for r in rows for k in r["solver"] or ()), "")
            cells = [" / ".join(_shown(r["solver"], calls, space) for r in rows) for space in SPACES]
            lines.append(f"| `{path}`: the teacher, {calls} solver steps | {' | '.join([*cells, '', ''])} | |")
        cells = [" / ".join(_shown(r["steps"], k, space) for r in rows) for k, space in MEASURES]
        lines.append(f"| `{path}`: `{stage}`, {images:,} images | {' | '.join(cells)} | {cpu:.0f} |")
    return "\n".join(lines) + "\n\n"


def _shown(steps: dict[str, Any] | None, k: str, space: str) -> str:
    return f"{steps[k][space]:#.3g}".rstrip(".") if steps else "not finite"


def rates(data: dict[str, Any]) -> str:
    """Every rate that was tried, on the seed that no other table shows."""
    lines = ["| objective | start | tried: mean log distance | taken |", "|---|---|---|---:|"]
    for row in data["rates"]:
        tries = sorted(row["tries"], key=lambda t: t["lr"])
        shown = ", ".join(
            f"{t['lr']:.2g}: {'failed' if t['score'] is None else format(t['score'], '.2f')}" for t in tries
        )
        taken = "none" if row["lr"] is None else f"{row['lr']:.2g}{', of the edge' * row['edge']}"
        lines.append(f"| `{row['kind']}@{row['path']}` | {TITLES[row['start']]} | {shown} | {taken} |")
    return "\n".join(lines) + "\n\n"


def answers(data: dict[str, Any]) -> str:
    """Each question's arms over the grid's own cell, after mid-training alone and after post-training."""
    out = []
    for name, question in questions.QUESTIONS.items():
        lines = []
        for path, kind in questions.KINDS.items():
            found = judged.Arms(data, name, kind, path, question.arms(data["suite"], path))
            measured = []
            for arm in found.order:
                cells = [text(found.effect(arm, k, space, after)) for k, after in PLACES for space in SPACES]
                if any(cells) or (arm == found.reference and found.rows(arm)):
                    shown = ["1"] * len(cells) if arm == found.reference else cells
                    measured.append(f"| `{kind}@{path}` | {arm} | {' | '.join(shown)} | {found.forwards(arm)} |")
            lines += measured if len(measured) > 1 else []  # the arm that the grid itself uses is no answer alone
        out.append(f"**{question.asks}** (`--question {name}`, `{question.key}`)\n")
        if not lines:
            out.append(f"Not measured yet: `python -m bench grid {data['suite']} --question {name}`.\n")
            continue
        heads = [f"{after}, {steps(k)}, {HEADS[space]}" for k, after in PLACES for space in SPACES]
        out += [f"| objective | arm | {' | '.join(heads)} | teacher's and all forwards, thousands |"]
        out += ["|---|---|" + "---|" * (len(heads) + 1), *lines, ""]
    return "\n".join(out) + "\n\n"


def verdict(data: dict[str, Any]) -> str:
    """Pooled ratios, which objectives agree and which do not, and what it says of the claim."""
    found = Table(data["rows"])
    lines = [
        f"| start, equal in | {' | '.join(f'{HEADS[space]}, {steps(k)}' for k, space in MEASURES)} |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for start in ("mid", "anchored", "scratch"):
        for equal in EQUAL:
            cells = [text(found.pooled(start, equal, k, space)) for k, space in MEASURES]
            if any(cells):
                lines.append(f"| {TITLES[start]}, {equal} | {' | '.join(cells)} |")
    out = [
        f"Over `pre`, pooled over {len(found.names)} objectives ({', '.join(f'`{n}`' for n in found.names)}):\n",
        *lines,
        "",
    ]
    for start in ("mid", "anchored"):
        for equal in EQUAL:
            out += [said for k in STEPS if (said := _said(found, start, equal, k))]
    out += ["", _claim(found), "", *_alone(found), "", _about(data, found)]
    return "\n".join(out) + "\n\n"


def _said(found: Table, start: str, equal: str, k: str) -> str:
    """`- In 1 step, from mid, equal images: nearer in both spaces: ...`"""
    by: dict[str, list[str]] = {}
    for name in found.names:
        if any(found.effect(name, start, equal, k, space) for space in SPACES) or found.failures(name, start, equal):
            by.setdefault(found.says(name, start, equal, k), []).append(f"`{name}`")
    if not by:
        return ""
    order = [(VERDICTS[key], by[key]) for key in ("farther", "apart", "open", "nearer") if key in by]
    return (
        f"- {TITLES[start]}, {steps(k)}, equal {equal}: "
        + "; ".join(f"{title}: {', '.join(names)}" for title, names in order)
        + "."
    )


def _claim(found: Table) -> str:
    """Whether any objective contradicts the claim, which agree, and of which it is not known."""
    if len(found.seeds) < 2:
        return "One seed has no interval: nothing can be said of the claim."
    places = [(start, equal, k) for start in ("mid", "anchored") for equal in EQUAL for k in STEPS]
    against = [(name, *p) for name in found.names for p in places if found.says(name, *p) == "farther"]
    if against:
        shown = ", ".join(f"`{n}` ({TITLES[start]}, equal {equal}, {steps(k)})" for n, start, equal, k in against)
        return (
            "**The claim that mid-training helps any flow map does not stand here.** Farther in both spaces by the interval "
            f"over seeds, or failed: {shown}."
        )
    shown_for = lambda name: any(
        all(found.says(name, start, equal, k) == "nearer" for equal in EQUAL for k in STEPS)
        for start in ("mid", "anchored")
    )
    agree = [name for name in found.names if shown_for(name)]
    left = [f"`{name}`" for name in found.names if name not in agree]
    rest = f" For {', '.join(left)} the seeds do not decide it." if left else ""
    return (
        f"**No objective here contradicts the claim** that mid-training helps any flow map. It is shown, in both spaces, at one "
        f"and two steps and at both equalities, for {len(agree)} of {len(found.names)}.{rest}"
    )


def _alone(found: Table) -> list[str]:
    """What post-training adds to as much mid-training."""
    lines = []
    for name in found.names:
        for start in ("mid", "anchored"):
            cells = [found.beyond_alone(name, start, k, space) for k, space in MEASURES]
            if any(cells):
                mean = sum(math.log(c.value) for c in cells if c)
                lines.append((-mean, f"| `{name}` | {TITLES[start]} | {' | '.join(map(text, cells))} |"))
    if not lines:
        return []
    heads = " | ".join(f"{HEADS[space]}, {steps(k)}" for k, space in MEASURES)
    return [
        "Over mid-training alone for as many student images: what the objective itself adds.\n",
        f"| objective | start | {heads} |",
        "|---|---|" + "---|" * len(MEASURES),
        *(line for _, line in sorted(lines)),
    ]


def _seeds(found: Table) -> str:
    """`seeds 0, 1, 2`, and of which objectives there are more."""
    of = {name: found.seeds_of(name) for name in found.names}
    usual = min(of.values(), key=len)
    more = [f"of `{name}` {', '.join(map(str, own))}" for name, own in of.items() if own != usual]
    return "; ".join([f"seeds {', '.join(map(str, usual))}", *more])


def _about(data: dict[str, Any], found: Table) -> str:
    lengths, cells = data["lengths"], len(data["rows"])
    resumed = sum(r["starts"] > 1 for r in data["rows"])
    return (
        f"{data['suite']}: {lengths['total']:,} student images a cell, {lengths['mid']:,} of them of mid-training where there is "
        f"one; {_seeds(found)}; {lengths['n']:,} samples; {cells} cells, {resumed} of them killed and "
        f"taken up again; {data['cpu_s'] / 3600:.1f} CPU hours with the searches and the stages that cells share; "
        f"{data['device']}, {data['threads']} thread{'s' * (data['threads'] != 1)}, torch {data['torch']}; "
        f"commit {data['commit']}, {data['date'][:10]}."
    )
