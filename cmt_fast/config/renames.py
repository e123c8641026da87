"""Keys that had another name before: read under both, and fingerprinted under the first, so that a rename changes no digest."""

from __future__ import annotations

from typing import Any

from cmt_fast.config.errors import ConfigError

# (the key that holds it where that matters, name of before) -> today's
RENAMED = {("", "clip"): "grad_clip_norm", ("anchor", "share"): "fraction"}
FIRST = {(parent, now): before for (parent, before), now in RENAMED.items()}


def renamed(tree: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """Plain data with today's keys, and for each that had a name of before `old is now new`.

    Raises ConfigError where both names are given.
    """
    if not isinstance(tree, dict):
        return tree, []
    out, notes = {}, []
    for key, value in tree.items():
        parent = prefix.rpartition(".")[2]
        now = RENAMED.get((parent if parent == "anchor" else "", key), key)
        if now != key and prefix:
            if now in tree:
                raise ConfigError(f"{prefix}.{key}: is now {prefix}.{now}, and both are given")
            notes.append(f"{prefix}.{key} is now {prefix}.{now}")
        else:
            now = key
        out[now], more = renamed(value, f"{prefix}.{key}".lstrip("."))
        notes += more
    return out, notes


def first_names(tree: Any, parent: str = "") -> Any:
    """Plain data of a dumped run with every key under the name that it had first."""
    if not isinstance(tree, dict):
        return tree
    holder = parent if parent == "anchor" else ""
    return {FIRST.get((holder, key), key) if parent else key: first_names(v, key) for key, v in tree.items()}
