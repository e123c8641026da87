"""How tables of the report write settings."""

from __future__ import annotations

import json

from cmt_fast.runtime.words import DASH

TEXT = 99  # every column is text


def differences(a: dict, b: dict, prefix: str = "") -> list[list[str]]:
    """Dotted keys in which two settings differ, with both values; a table that only one has is one row."""
    rows: list[list[str]] = []
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            rows += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            plain = str.maketrans("", "", '"{}')
            rows.append([f"{prefix}{key}", *(DASH if v is None else json.dumps(v).translate(plain) for v in (x, y))])
    return rows
