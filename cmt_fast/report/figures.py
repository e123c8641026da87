"""What is known of how good networks are, as figures.json of a stage has it (judged.py): read here without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cmt_fast.storage import sound

FIGURES = "figures.json"
Figures = dict[str, Any]  # of one network in so many steps, as evaluation/measures.py names them
Curve = list[tuple[int, float]]  # (student images, Fréchet distance)


class Judged(NamedTuple):
    """Figures of one network by number of steps, as a few-step generator and by the solver; None: not finite.

    Figures are those of evaluation/measures.py but `left_out`. during: those by the solver on as many samples as are judged in
    training, to be drawn beside those curves. left_out: {"few": {steps: {distance: [...]}}, "solver": ...}, of which intervals
    are made.
    """

    few: dict[str, Figures | None]
    solver: dict[str, Figures | None]
    during: dict[str, Figures | None]
    left_out: dict[str, dict[str, dict[str, list[float]]]] = {}

    def figures(self, steps: int | str, how: str = "few") -> Figures | None:
        """Those of so many steps with `left_out`; None where they are not finite or nobody judged them."""
        found = getattr(self, how).get(str(steps))
        return {**found, "left_out": self.left_out.get(how, {}).get(str(steps), {})} if found else None


class Names(NamedTuple):
    """What the report calls the judge: its first feature space, its second, and the distance (Fréchet, FID, FD-DINOv2)."""

    first: str
    second: str
    distance: str


def plain(row: Figures) -> dict[str, float]:
    """What of a row of figures is one number."""
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def stored(file: Path) -> tuple[dict[str, Any], Judged] | None:
    """The key and the figures of a figures.json; None where there is none, or it is not what was written."""
    try:
        return checked(file)
    except (OSError, sound.Unsound):
        return None


def checked(file: Path) -> tuple[dict[str, Any], Judged]:
    """The same. Raises FileNotFoundError, Unsound."""
    found = sound.read(file)
    key, left_out = found.get("key"), found.get("left_out", {})
    judged = Judged(*(found.get(how) for how in ("few", "solver", "during")), left_out)  # type: ignore[arg-type]
    whole = isinstance(key, dict) and isinstance(key.get("eval", {"n": 0}), dict)
    for of in judged:
        whole = whole and isinstance(of, dict) and all(isinstance(v, dict | None) for v in of.values())
    for of in judged[:3] if whole else ():
        whole = whole and all(f is None or _number(f.get("frechet")) for f in of.values())
    if not whole or not isinstance(key["eval"].get("n") if "eval" in key else 0, int):  # type: ignore[index,operator]
        raise sound.Unsound(file, "holds no figures as a report writes them")
    return key, judged  # type: ignore[return-value]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
