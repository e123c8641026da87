"""What a user typed is wrong: one line that names the key, what it was, what is valid and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """Foreign text as a terminal, a log, a page or a picture may show it, its lines as they are: what is not printable (control
    characters, escapes to a terminal, marks that turn the direction of text, bytes that are no Unicode) is written out.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int = 0) -> str:
    """The same in one line, where white space is a blank. most: characters after which it is cut, 0 for all."""
    text = printable(" ".join(text.split()))
    return text[:most] + "..." if 0 < most < len(text) else text


LONGEST = 3_000  # characters of an error; none is as long that does not repeat what was typed
LONGEST_KEY = 150  # of the key before it


class ConfigError(ValueError):
    """What a user typed is wrong: one line that names the key, what it was and what is valid.

    key: the recipe's key, option or argument that it is about, "" where it is about none; reason: the line without it.
    A caller that knows where the key stands says so by `under`.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        """text: the reason where `key` is given, else `KEY: reason`."""
        text = one_line(text, LONGEST)
        if key is None:
            head, colon, rest = text.partition(": ")
            key, text = (head, rest) if colon and " " not in head else ("", text)
        self.key, self.reason = key, text
        super().__init__(f"{one_line(key, LONGEST_KEY)}: {text}" if key else text)

    def under(self, parent: str) -> ConfigError:
        """The same error of a key that stands under `parent`."""
        return ConfigError(self.reason, f"{parent}.{self.key}" if self.key else parent)


def nearest(name: object, valid: Iterable[object]) -> str:
    """The end of an error line: "; did you mean ...?" or nothing."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
