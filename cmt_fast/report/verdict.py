"""What the figures say: ratios with their intervals, and where one measure contradicts another.

A measure is believed where its 95 % interval leaves out 1, and for shares where they differ by more than two binomial standard
errors. What is said: which of two networks wins by the distance, and which other measure says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.evaluation import intervals
from cmt_fast.evaluation.intervals import Interval
from cmt_fast.report.figures import Figures

SPACES = {"frechet": "first", "frechet_2": "second"}
MUCH = 1.5  # times, from which two ratios of the same winner are said to differ
PAIRS = (("post", "control"), ("post", "mid"))


class Ratio(NamedTuple):
    """One distance over another; low and high: of its 95 % interval, the value itself where there is none."""

    value: float
    low: float
    high: float

    @property
    def winner(self) -> int | None:
        """0: the first is nearer, 1: the second is, None: they cannot be told apart."""
        return 0 if self.high < 1 else 1 if self.low > 1 else None


def text(value: Interval | Ratio | float, form: str = ".3g") -> str:
    """`0.35 [0.31, 0.39]`, or a plain number where there is no interval."""
    if isinstance(value, float | int):
        return format(value, form)
    if value.low == value.high:
        return format(value.value, form)
    x, low, high = (format(v, f"#{form}").removesuffix(".") for v in value)  # 0.430 beside 0.349: as many digits
    return f"{x} [{low}, {high}]"


def distance(figures: Figures, key: str) -> Interval | float:
    """A distance with its interval, where one can be had."""
    return intervals.interval(figures[key], figures.get("left_out", {}).get(key, ())) or figures[key]


def ratio(a: Figures | None, b: Figures | None, key: str) -> Ratio | None:
    """Of the distances of two networks; None where one of them has none, or one of 0."""
    if not a or not b or not a.get(key) or not b.get(key):
        return None
    out = [f.get("left_out", {}).get(key, ()) for f in (a, b)]
    found = intervals.ratio(a[key], b[key], *out)
    value = a[key] / b[key]
    return Ratio(*found) if found else Ratio(value, value, value)


def disagreements(figures: dict[str, Figures | None], real: float | None, n: int, steps: str) -> list[str]:
    """One sentence for each measure that contradicts the distance. figures: of networks by stage, in the same steps.

    real: sharpness of real rows; n: samples; steps: `1 step`.
    """
    out = []
    for pair in PAIRS:
        a, b = (figures.get(name) for name in pair)
        first, second = (ratio(a, b, key) for key in SPACES)
        if not a or not b or not first:
            continue
        if second and (said := _spaces(pair, first, second, steps)):
            out.append(said)
        winner = first.winner
        if winner is None:
            continue
        best, other = (pair[winner], a if winner == 0 else b), (pair[1 - winner], b if winner == 0 else a)
        out += _sharpness(best, other, real, steps) + _shares(best, other, n, steps)
    return out


def _spaces(pair: tuple[str, str], first: Ratio, second: Ratio, steps: str) -> str:
    a, b = pair
    both = f"{a} / {b} is {text(first)} in the first and {text(second)} in the second"
    if first.winner == second.winner:
        apart = first.high < second.low or second.high < first.low
        factor = max(first.value / second.value, second.value / first.value)
        if first.winner is None or not apart or factor < MUCH:
            return ""
        return f"The two feature spaces agree on who wins in {steps}, not on by how much: {both}."
    if None in (first.winner, second.winner):
        which = "first" if second.winner is None else "second"
        said = f"The two feature spaces disagree in {steps}: only the {which} tells {a} and {b} apart; {both}."
        return said if pair == PAIRS[0] else ""  # mid and post are often alike; that one space is finer is no news
    return (
        f"The two feature spaces disagree on who wins in {steps}: {pair[first.winner or 0]} by the first, "
        f"{pair[second.winner or 0]} by the second; {both}."
    )


Named = tuple[str, Figures]


def _sharpness(best: Named, other: Named, real: float | None, steps: str) -> list[str]:
    """Whether who wins by the distance is farther from real sharpness than who loses."""
    mine, theirs = (f.get("sharpness") for _, f in (best, other))
    differ = ratio(best[1], other[1], "sharpness")
    if mine is None or theirs is None or real is None or differ is None or differ.winner is None:
        return []
    if abs(mine - real) <= abs(theirs - real):
        return []
    how = "blurrier" if mine < theirs else "rougher"
    return [
        f"The winner in {steps} is the {how} one: the share of high-frequency energy is {mine:.3f} for {best[0]}, "
        f"{theirs:.3f} for {other[0]}, {real:.3f} for real rows."
    ]


def _shares(best: Named, other: Named, n: int, steps: str) -> list[str]:
    """Precision or recall of who wins that is lower than that of who loses, by more than chance."""
    from cmt_fast.evaluation.kept import ROWS  # which comes with torch; ratios alone do without

    out, n = [], min(n, ROWS)
    meaning = {"precision": "fewer of its samples look real", "recall": "it covers less of the real data"}
    for key, means in meaning.items():
        for tail, space in zip(("", "_2"), ("first", "second")):
            mine, theirs = (f.get(key + tail) for _, f in (best, other))
            if mine is None or theirs is None:
                continue
            error = ((mine * (1 - mine) + theirs * (1 - theirs)) / n) ** 0.5
            if theirs - mine > 2 * error and theirs > mine:
                out.append(
                    f"The winner in {steps} has the lower {key} in the {space} space, {mine:.3f} for {best[0]} and "
                    f"{theirs:.3f} for {other[0]}: {means}."
                )
    return out
