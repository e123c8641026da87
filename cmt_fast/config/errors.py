"""What a user typed is wrong: one line that names the key, what it was, what is valid and the nearest name."""

from __future__ import annotations

import difflib


class ConfigError(ValueError):
    """What a user typed is wrong: one line that names the key, what it was and what is valid."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


# ---------------------------------------------------------------------------------------------- error text


def nearest(name: str, valid) -> str:
    """The end of an error line: "; did you mean ...?" or nothing."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
