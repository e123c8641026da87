"""Times, sizes and counts as a person reads them: the one place for how lines, tables and pages write them."""

from __future__ import annotations

from collections.abc import Mapping

from cmt_fast.config.errors import one_line, printable

DASH = "–"
UNITS = {"gpu": "GPU", "core": "core"}  # of a bill


def number(value: float | None, form: str = ".4g") -> str:
    """A figure, or a dash where there is none."""
    return DASH if value is None else format(value, form)


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


def duration(seconds: float) -> str:
    """As 4 s, 3 min 05 s, 2 h 14 min, 3 d 04 h: two units."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def about(seconds: float) -> str:
    """How long ago, in one unit: 12 s, 90 min, 3 h, 12 d; never less than nothing, as where clocks differ."""
    seconds = max(0.0, seconds)
    for unit, span, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if round(seconds / span) * span < most:
            return f"{seconds / span:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def hours(h: float) -> str:
    """Device-hours to about two digits: 0.003, 0.52, 3.1, 41.2, 1,234."""
    if h < 0.01:
        return f"{h:.1g}" if h >= 1e-4 else "0"
    return f"{h:.2g}" if h < 1 else f"{h:,.1f}" if h < 100 else f"{h:,.0f}"


def device_hours(spent: Mapping[str, float]) -> str:
    """`3.2 GPU-h, 0.5 core-h`, by unit of the bill; a dash for none."""
    return ", ".join(f"{hours(h)} {UNITS.get(unit, unit)}-h" for unit, h in spent.items()) or DASH


def speed(per_s: float) -> str:
    """Images or steps a second, as 0.42, 9.3, 976, 12,345."""
    return f"{per_s:.2f}" if per_s < 1 else f"{per_s:.1f}" if per_s < 10 else f"{per_s:,.0f}"


__all__ = [
    "DASH", "UNITS", "about", "device_hours", "duration", "hours", "number", "one_line", "printable", "size", "speed", "steps",
]  # fmt: skip
