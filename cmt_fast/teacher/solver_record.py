"""What was chosen for `nfe: auto`, and why: RUN/STAGE/solver.json, written before the first step and read ever after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Trajectories
from cmt_fast.storage import sound
from cmt_fast.teacher.solver_error import Estimate, Solver

FILE = "solver.json"


# ---------------------------------------------------------------------------------------------- what is kept


class Kept(NamedTuple):
    """RUN/STAGE/solver.json: what `nfe: auto` was settled to, and on what grounds.

    epsilon: {"value": mean square per dimension, "source": how it is known, ...}; networks: checksums of those rolled out;
    rows: the table, a row per estimate; calls: network calls spent on it, over all trajectories. worth: of a stage with a budget,
    {"rule": "bias" or "error", "why", "budget_forwards", "images", ...}, as teacher/solver_worth.py has them.
    """

    choice: dict[str, Any]
    serves: bool
    limit: float
    epsilon: dict[str, Any]
    networks: dict[str, str]
    trajectories: int
    calls: int
    rows: list[dict[str, Any]]
    worth: dict[str, Any] | None = None

    @property
    def images(self) -> int | None:
        """Of the stage, where they follow from a budget."""
        return self.worth and self.worth["images"]


def read(folder: Path) -> Kept | None:
    """What was settled for the stage in `folder`, if it was. Raises ConfigError for a file that cannot be read."""
    try:
        found = sound.read(folder / FILE)
        found.pop("stage", None)
        kept = Kept(**found)
    except FileNotFoundError:
        return None
    except sound.Unsound as error:
        raise ConfigError(f"{error}; remove it to measure again") from None
    except TypeError as error:
        raise ConfigError(f"{folder / FILE}: cannot be read ({error}); remove it to measure again") from None
    kinds = (dict, bool, float | int, dict, dict, int, int, list, dict | None)
    if (
        not all(isinstance(v, of) for v, of in zip(kept, kinds, strict=True))
        or not all(isinstance(r, dict) for r in kept.rows)
        or not (kept.worth is None or isinstance(kept.worth.get("images"), int))
    ):
        raise ConfigError(f"{folder / FILE}: cannot be read (it is no record of a choice); remove it to measure again")
    return kept


def settled(folder: Path, config: Trajectories) -> Trajectories:
    """The trajectories of the stage in `folder` with numbers in place of `auto`. Raises ConfigError before it is settled."""
    if config.nfe != "auto":
        return config
    kept = read(folder)
    if kept is None:
        raise ConfigError(
            f"{folder.name}.trajectories.nfe: auto is settled when the stage begins, {folder} holds no {FILE}"
        )
    return dataclasses.replace(config, **kept.choice)


def rows_of(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    """Estimates as plain data; infinite numbers are null."""
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    return [
        {**e.setting._asdict(), **{k: finite(v) for k, v in e._asdict().items() if k != "setting"}} for e in estimates
    ]


def told(worth: dict[str, Any]) -> str:
    """Of a stage with a budget: by what was chosen, and how long the stage is."""
    length = f"{worth['images']:,} images are what {worth['budget_forwards']:,} forwards hold with it"
    if worth["rule"] == "error":
        return f"{length}; the bound on the gradient's bias was not weighed ({worth['why']}), the error alone chose"
    rest = f"; {n} dearer ones cannot be below it" if (n := len(worth["passed"])) else ""
    return (
        f"chosen by the bound on the gradient's bias: {worth['weight']:.3g} epsilon + the targets' error squared is "
        f"{worth['weight']:.3g} x {worth['epsilon']:.3g} + {worth['along']:.3g}^2 = {worth['bound']:.3g}, the least{rest}; "
        f"{length}; {worth['why']}"
    )


ESTIMATED = ("error", "low", "high", "observed", "clean")  # null in a row of a candidate that was weighed without
HEAD = ["solver", "NFE", "calls/row", "error", "from", "to", "order seen"]


def estimated(row: dict[str, Any]) -> bool:
    """Whether a row has an estimate of its endpoint, were it infinite."""
    return row["clean"] is not None


def cells(row: dict[str, Any]) -> list[str]:
    """One row of `rows_of` as the cells under `HEAD`; an order in brackets was no ground to extrapolate."""
    none = "inf" if estimated(row) else "-"
    number = lambda v: none if v is None else f"{v:.3g}"
    p = row["observed"]
    observed = "-" if p is None else f"{p:.2f}" if row["clean"] else f"({p:.1f})"
    named = Solver(*(row[k] for k in Solver._fields))
    return [
        named.title(),
        str(row["nfe"]),
        f"{row['cost']:.3g}",
        *(number(row[k]) for k in ("error", "low", "high")),
        observed,
    ]


WORTH_HEAD = ["images", "epsilon", "targets miss", "to", "bound"]


def worth_cells(row: dict[str, Any]) -> list[str]:
    """The rest of a row of a stage with a budget, under `WORTH_HEAD`."""
    number = lambda v: "inf" if v is None else f"{v:.3g}"
    return [f"{row['images']:,}", *(number(row[key]) for key in ("epsilon", "along", "along_high", "bound"))]


def serves(row: dict[str, Any], limit: float) -> str:
    """Whether the upper end of a row's error stays below a limit, in a word."""
    if not estimated(row):
        return "-"
    return "yes" if row["high"] is not None and row["high"] <= limit else "no"


def override(stage: str, choice: dict[str, Any]) -> str:
    """The choice as overrides of a recipe."""
    return " ".join(f"{stage}.trajectories.{key}={value}" for key, value in choice.items())
