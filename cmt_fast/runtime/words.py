"""Sizes, counts and ages as a person reads them."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes as `512 B`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def age(seconds: float) -> str:
    """How long ago, in one unit: `12 s`, `90 min`, `3 h`, `12 d`; never less than nothing, as where clocks differ."""
    seconds = max(0.0, seconds)
    for unit, span, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if round(seconds / span) * span < most:
            return f"{seconds / span:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def steps(k: int | str) -> str:
    """`1 step`, `2 steps`."""
    return f"{k} step{'s' * (int(k) > 1)}"
