"""What a restart reads and how long a save stops the steps, before and after, from bench/results/cpu/restart.json."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any


def table(results: Path, footer: Any) -> str:
    """A row for each number of processes, one for saves, and an XXL's as counted from them."""
    data = json.loads((results / "restart.json").read_text("utf-8"))
    named = {row["name"]: row for row in data["rows"]}
    copy, xxl = data["copy_bytes"], {row["name"]: row for row in data["xxl"]}
    lines = [f"| a checkpoint of {sum(data['files'].values()) / 1e6:,.0f} MB | before | after |", "|---|---|---|"]
    for i, row in enumerate(named["after"]["restart"]):
        n = row["processes"]
        cells = [_read(named[name]["restart"][i], copy) for name in ("before", "after")]
        lines.append(
            f"| restart of a stage, {n} process{'es' * (n > 1)}: hashed; CPU seconds to the first step | {' | '.join(cells)} |"
        )
    stall = lambda name, kind: f"{median(named[name]['save'][kind]['wall_s']):.2f} s"
    waiting = f"{stall('after', 'background')} (`saves=waiting`: {stall('after', 'waiting')})"
    lines.append(f"| a save: no step for | {stall('before', 'background')} | {waiting} |")
    cells = [f"{xxl[n]['hashed_bytes'] / 1e9:,.0f} GB; {xxl[n]['cpu_s']:,.0f} CPU s" for n in ("before", "after")]
    lines.append(f"| counted: EDM2-XXL on {data['xxl_ranks']} ranks, hashed at a restart | {' | '.join(cells)} |")
    cells = [f"{xxl[n]['stall_s']:.1f} s" for n in ("before", "after")]
    lines.append(f"| counted: EDM2-XXL, a save by this disk and memory | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{footer(data)} Before: {named['before']['commit']}.\n\n"


def _read(row: dict[str, Any], copy: int) -> str:
    """`2.4 GB (24 copies on each rank); 3.1 s`."""
    first, *others = [round(n / copy, 1) for n in row["hashed"]]
    each = f"{first:g} copies of the weights" + (f", {others[0]:g} on each other rank" if others else "")
    return f"{sum(row['hashed']) / 1e9:,.1f} GB ({each}); {row['cpu_s']:.1f}"
