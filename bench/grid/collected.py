"""What a folder's cells found, in one file: rows, learning rates, shared stages, the floor, and the processor seconds of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.grid import cells, tuning
from bench.grid.cells import ALONE, STARTS, SUITES, Cell
from bench.grid.machine import SHARED, Machine
from bench.harness.results_file import about, write_json
from cmt_fast.config import fingerprint
from cmt_fast.objectives import OBJECTIVES


def write(machine: Machine, suite: str, file: Path) -> Path:
    """Rewrite the JSON from all that stands in the folder, of runs as they stand today."""
    rows = [r for r in (_read(p) for p in sorted((machine.out / "cells").glob("*.json"))) if r and r["suite"] == suite]
    shared = [json.loads(p.read_text("utf-8")) for p in sorted((machine.out / "shared").glob(f"*/{SHARED}"))]
    floor = machine.out / f"floor-{suite}.json"
    found = {r["kind"]: r["path"] for r in rows}
    content = about("cpu") | {
        "suite": suite,
        "lengths": SUITES[suite]._asdict(),
        "digests": {p: fingerprint.digest(cells.base(suite, p)) for p in sorted(set(found.values()))},
        "objectives": {
            name: {
                "title": OBJECTIVES[cells.kind_of(name)].title,
                "paper": OBJECTIVES[cells.kind_of(name)].paper,
                "asks": _asks(suite, name, path),
            }
            for name, path in found.items()
            if name != ALONE
        },
        "floor": json.loads(floor.read_text("utf-8")) if floor.is_file() else None,
        "shared": [s for s in shared if s["suite"] == suite],
        "rates": _rates([r for r in rows if r["seed"] == tuning.SEED and not r["arm"]]),
        "rows": [r for r in rows if r["seed"] != tuning.SEED],
        "cpu_s": sum(sum(r["cpu_s"].values()) for r in rows) + sum(s["cpu_s"] for s in shared if s["suite"] == suite),
    }
    write_json(file, _short(content))
    return file


def _short(tree: Any) -> Any:
    """Numbers to six digits: a grid has thousands of them."""
    if isinstance(tree, dict):
        return {key: _short(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_short(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


def _read(file: Path) -> dict[str, Any] | None:
    """A row, unless its run is another one today."""
    kept = json.loads(file.read_text("utf-8"))
    fields = {key: kept["row"][key] for key in Cell._fields}
    try:
        now = cells.digest(cells.run_of(Cell(**{**fields, "more": tuple(fields["more"])})))
    except ValueError:  # an objective that is gone
        return None
    return kept["row"] if kept["digest"] == now else None


def _asks(suite: str, kind: str, path: str) -> str:
    return cells.run_of(Cell(suite, kind, path, "pre", "images", 0, 1e-3)).post.objective.asks


def _rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was tried for each objective and start, and what won."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["path"], row["start"]), []).append(row)
    out = []
    for (kind, path, start), tried in sorted(found.items(), key=lambda kv: (*kv[0][:2], STARTS.index(kv[0][2]))):
        scores = [{"lr": r["lr"], "score": tuning.score(r) if "failed" not in r else None} for r in tried]
        done = [s for s in scores if s["score"] is not None]
        best = min(done, key=lambda s: s["score"])["lr"] if done else None
        first = {s["lr"] for s in scores if s["lr"] in tuning.FIRST}
        out.append({"kind": kind, "path": path, "start": start, "lr": best, "edge": best not in first, "tries": scores})
    return out
