"""What a user typed is wrong: one line that names the key, what it was, what is valid and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: str, most: int = 0) -> str:
    """Foreign text for a line that a terminal, a log or a page shows: white space is a blank, and what is not printable (control
    characters, escapes to a terminal, marks that turn the direction of text, bytes that are no Unicode) is written out.

    most: characters after which it is cut, 0 for all.
    """
    text = " ".join(text.split())
    text = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text[:most] + "..." if 0 < most < len(text) else text


class ConfigError(ValueError):
    """What a user typed is wrong: one line that names the key, what it was and what is valid.

    key: the recipe's key, option or argument that it is about, "" where it is about none; reason: the line without it.
    A caller that knows where the key stands says so by `under`.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        """text: the reason where `key` is given, else `KEY: reason`."""
        text = one_line(text)
        if key is None:
            head, colon, rest = text.partition(": ")
            key, text = (head, rest) if colon and " " not in head else ("", text)
        self.key, self.reason = key, text
        super().__init__(f"{key}: {text}" if key else text)

    def under(self, parent: str) -> ConfigError:
        """The same error of a key that stands under `parent`."""
        return ConfigError(self.reason, f"{parent}.{self.key}" if self.key else parent)


def nearest(name: object, valid: Iterable[object]) -> str:
    """The end of an error line: "; did you mean ...?" or nothing."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
