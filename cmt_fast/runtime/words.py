"""Sizes and counts as a person reads them."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes as `512 B`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def steps(k: int | str) -> str:
    """`1 step`, `2 steps`."""
    return f"{k} step{'s' * (int(k) > 1)}"
