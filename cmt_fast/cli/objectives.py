"""`cmt objectives`: the shelf, what each objective asks for, costs and is prepared by, whether it is at rest at its answer."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmt_fast.config import loading, recipes
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.runtime import progress

ROWS = 64  # of the batch that work is counted with
ASKS = {
    "instant": "the denoiser or velocity at a point",
    "end": "where a trajectory ends, from any of its points",
    "pairs": "the average velocity between any two times",
    "halves": "the average velocity between times that differ by a power of 1/2",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=objectives)
    p.add_argument(
        "kinds", nargs="*", metavar="KIND", help="some of them, each with its equation and keys (default: all)"
    )
    p.add_argument(
        "--check", action="store_true", help="the gradient of each at its closed-form answer and away from it"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write what is printed here too")


def objectives(args: argparse.Namespace) -> None:
    from cmt_fast.objectives import OBJECTIVES
    from cmt_fast.storage import files

    for kind in args.kinds:
        if kind not in OBJECTIVES:
            valid = ", ".join(OBJECTIVES)
            raise ConfigError(f"cmt objectives: {kind!r} is none; valid are {valid}{nearest(kind, list(OBJECTIVES))}")
    kinds = args.kinds or list(OBJECTIVES)
    rows = {kind: about(kind) for kind in kinds}
    if args.check:
        for kind, found in checked(kinds):
            rows[kind]["rest"] = found
    print("\n\n".join(whole(kind, row) for kind, row in rows.items()) if args.kinds else table(rows))
    if args.check:
        print(f"\n{rest_table(rows)}")
    if args.json:
        files.write_text(args.json, json.dumps(rows, indent=1) + "\n")
    wrong = [kind for kind, row in rows.items() if args.check and not row["rest"]["holds"]]
    if wrong:
        raise FloatingPointError(f"not at rest where they should be: {', '.join(wrong)}")


def about(kind: str) -> dict[str, Any]:
    """What an objective is: title, paper, equation, path, what it asks and costs, recipes, keys."""
    from cmt_fast.objectives import OBJECTIVES, counting, mid

    spec, config = OBJECTIVES[kind], default(kind)
    path = spec.path or "linear"
    work = counting.work(config, _path(path), ROWS)
    alone = config.asks == "instant" or spec.draws == "trajectories"
    prepared = [] if alone else [mid.prepares(config, on).kind for on in ("ve", "linear") if spec.on(on)]
    return {
        "title": spec.title,
        "paper": spec.paper,
        "equation": spec.equation,
        "path": spec.path or "ve, linear",
        "asks": config.asks,
        "tangents": spec.tangents,
        "work": {**work._asdict(), "forwards": work.forwards},
        "prepared_by": " or ".join(prepared) or None,
        "recipes": used_by(kind),
        "keys": {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "kind"},
    }


def default(kind: str) -> Any:
    """An objective with its keys at their defaults."""
    from pydantic import TypeAdapter

    from cmt_fast.config.schema.objective import Objective

    return TypeAdapter(Objective).validate_python({"kind": kind})


def used_by(kind: str) -> list[str]:
    """RECIPE/STAGE of the package's recipes, anchors too."""
    return [name for name, kinds in _kinds_of_stages().items() if kind in kinds]


@functools.cache
def _kinds_of_stages() -> dict[str, list[str]]:
    """Of each RECIPE/STAGE its objective's kind and its anchor's; the recipes are read once, not for every objective."""
    return {
        f"{name}/{stage}": [own.objective.kind, *([own.anchor.objective.kind] if own.anchor else [])]
        for name in recipes.recipes()
        for stage, own in loading.load(name).stages.items()
    }


def checked(kinds: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each objective at its closed-form answer and away from it, and the processor's seconds that it took."""
    from cmt_fast.evaluation import rest

    for kind in kinds:
        begun = time.process_time()
        with progress.phase(f"{kind} at its closed form", quiet=True):
            found = rest.measure(kind)
        yield kind, {**found._asdict(), "holds": found.holds, "cpu_s": time.process_time() - begun}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line an objective: work of the network for one row, backward counted as two."""
    lines = [f"{'kind':<12}{'path':<12}{'asks':<9}{'forwards':>8}  {'of them':<46}{'prepared by':<18}title, paper"]
    for kind, row in rows.items():
        work = row["work"]
        lines.append(
            f"{kind:<12}{row['path']:<12}{row['asks']:<9}{work['forwards']:>8.3g}  {parts(work):<46}"
            f"{row['prepared_by'] or '-':<18}{row['title']}; {row['paper']}"
        )
    return "\n".join([*lines, "", "`cmt objectives KIND` shows the equation, the keys and the recipes of one"])


def parts(work: dict[str, float]) -> str:
    """What the forwards of a row are of."""
    named = {"trained": 3 * work["trained"], "targets": work["plain"], **{k: work[k] for k in ("tangents", "teacher")}}
    return ", ".join(f"{n:.3g} {what}" for what, n in named.items() if n)


def whole(kind: str, row: dict[str, Any]) -> str:
    """All about one objective."""
    keys = ", ".join(f"{key} {'null' if value is None else value}" for key, value in row["keys"].items())
    prepared = row["prepared_by"] and f"{row['prepared_by']} (cmt_fast/objectives/mid.py)"
    lines = [
        f"{kind}: {row['title']}",
        f"  {row['paper']}",
        "",
        *(f"    {e}" for e in row["equation"].splitlines()),
        "",
    ]
    facts = {
        "path": row["path"],
        "asks for": ASKS[row["asks"]],
        "work": f"{row['work']['forwards']:.3g} forwards a row, backward counted as two",
        "tangents": "some" if row["tangents"] else "none",
        "prepared by": prepared or "nothing: pre-training or mid-training itself",
        "keys": keys,
        "recipes": ", ".join(row["recipes"]) or "none",
    }
    return "\n".join([*lines, *(f"  {name:<12} {text}" for name, text in facts.items())])


def rest_table(rows: dict[str, dict[str, Any]]) -> str:
    """The mean gradient at the answer and away from it, with standard errors."""
    head = (
        "The mean gradient in theta where the network is the closed-form answer plus theta . phi, on a Gaussian mixture"
    )
    lines = [
        head,
        f"{'kind':<12}{'at the answer':>14}{'errors':>8}{'at theta = 1':>14}{'errors':>8}  at rest there alone",
    ]
    for kind, row in rows.items():
        found = row["rest"]
        near, far = found["answer_errors"], found["off_errors"]
        holds = "yes" if found["holds"] else "NO"
        lines.append(f"{kind:<12}{found['answer']:>14.2e}{near:>8.1f}{found['off']:>14.2e}{far:>8.1f}  {holds}")
    return "\n".join(lines)


def _path(name: str) -> Any:
    from cmt_fast.diffusion.paths import ProbabilityPath

    return ProbabilityPath(name)
