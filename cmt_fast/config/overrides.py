"""`a.b=value` of the command line, set in a recipe's tree; what was typed in another form is told in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmt_fast.config import scalars, synonyms
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.renames import renamed, today

KEY = re.compile(r"[\w]+(\.[\w]+)*")


def apply(tree: dict, overrides: Sequence[str]) -> list[str]:
    """Set every override in a recipe's tree, in order; a note for each key that has another name today.

    Raises ConfigError for one that is not of the form a.b=value.
    """
    _check_form(overrides)
    return [note for text in overrides for note in _set(tree, text)]


def _check_form(overrides: Sequence[str]) -> None:
    """One key, one =, one value, in one argument: what a shell took apart, or a colon for =, is said as it should be."""
    for i, text in enumerate(overrides):
        after = [*overrides[i + 1 : i + 3], "", ""]
        key, equals, raw = text.partition("=")
        if equals and key.strip() and raw.strip():
            continue
        meant = ""
        if KEY.fullmatch(text) and after[0] == "=":
            meant = f"{text}={after[1]}"
        elif KEY.fullmatch(text) and after[0].startswith("="):
            meant = f"{text}{after[0]}"
        elif equals and key.strip() and "=" not in after[0] and after[0]:
            meant = f"{key.strip()}={after[0]}"
        elif not equals and (colon := re.fullmatch(r"([A-Za-z_][\w.]*):\s*(.*)", text)):
            meant = f"{colon[1]}={colon[2] or after[0]}"
        elif KEY.fullmatch(text) and "." in text and after[0] and "=" not in after[0]:
            meant = f"{text}={after[0]}"
        if meant:
            raise ConfigError(f"override: {text!r} is not of the form a.b=value; did you mean {meant}, in one word?")
        if not equals or not key.strip():
            hint = synonyms.answer(text) if KEY.fullmatch(text) else ""
            raise ConfigError(f"override: {text!r} is not of the form a.b=value{'; ' * bool(hint)}{hint}")


def _set(tree: dict, text: str) -> list[str]:
    """Set one key, whatever its name was; a note where it has another today, for which a recipe may stand already."""
    key, _, raw = text.partition("=")
    key = key.strip()
    *parents, last = key.split(".")
    node = tree
    for i, name in enumerate(parents):
        if name == "ema":
            track = f"[{{kind: {'power' if last == 'sigma_rel' else 'constant'}, {last}: {raw.strip()}}}]"
            raise ConfigError(f"is a list of tracks; set all of it, as {'.'.join(parents[: i + 1])}={track}", key)
        child = node.get(name)
        if child is None or (isinstance(child, scalars.Word) and child.lower() in scalars.NULLS):
            child = node[name] = {}
        if not isinstance(child, dict):
            at = ".".join(parents[: i + 1])
            raise ConfigError(f"{at}: is {scalars.natural(child)!r}, it has no key {parents[i + 1 :] + [last]}")
        node = child
    now = today(tuple(parents), last)
    node[now], notes = renamed(scalars.value(raw, key), (*parents, now))
    return notes + ([f"{key} is now {'.'.join((*parents, now))}"] if now != last else [])
