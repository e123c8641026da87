"""`cmt keys`: every key of a recipe, what it takes and means, and which recipes of the package set it."""

from __future__ import annotations

import argparse
import difflib

from cmt_fast.config import describe
from cmt_fast.config.describe import Key
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import STAGES
from cmt_fast.config.synonyms import answer

LONG = 70  # characters of a value that is not printed


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=keys)
    text = "a key (post.lr), a part (post.anchor) or a last name (lr); default: all keys, one line each"
    p.add_argument("names", nargs="*", metavar="KEY", help=text)


def keys(args: argparse.Namespace) -> None:
    if not args.names:
        for key in describe.every():
            print(f"{_title(key)}: {_values(key)}. {key.text}")
        print(f"\n{describe.STAGE} is {', '.join(STAGES)}. `cmt keys KEY` says which recipes set it, and to what")
        return
    found = [(name, chosen(name)) for name in args.names]
    for name, some in found:
        for key in some:
            stage = name.partition(".")[0]
            print("\n".join(about(key, stage if stage in STAGES else "")))


def chosen(name: str) -> list[Key]:
    """The keys that a name means: one key in all its variants, a part and what is in it, or a last name wherever it is.

    Raises ConfigError with the nearest for a name that is none of these.
    """
    asked = describe.general(name.partition("=")[0])
    asked = describe.STAGE if asked in STAGES else asked
    every = describe.every()
    found = [k for k in every if k.name == asked or k.name.startswith(f"{asked}.")]
    found = found or [k for k in every if k.name.endswith(f".{asked}") or f".{asked}." in k.name]
    if found:
        return found
    names = [k.name for k in every] + [k.name.replace(describe.STAGE, s, 1) for k in every for s in STAGES]
    close = difflib.get_close_matches(name, names, 1, 0.8)
    meant = f"did you mean {close[0]}?" if close and "." in name else answer(name)
    hint = f"; {meant}" if meant else nearest(asked.rpartition(".")[2], [k.name.rpartition(".")[2] for k in every])
    raise ConfigError(f"cmt keys: {name!r} is no key of a recipe{hint or '; `cmt keys` lists all'}")


def about(key: Key, stage: str = "") -> list[str]:
    """The lines of one key; stage: the one that was asked for, "" for all."""
    by_value: dict[str, dict[str, list[str]]] = {}  # value -> recipe -> the stages where it stands
    for s in describe.users(key):
        place = s.name.partition(".")[0]
        if not stage or place == stage:
            value = s.value if len(s.value) < LONG else "a value of its own"
            by_value.setdefault(value, {}).setdefault(s.recipe, []).append(place)
    lines = [f"{value}: {', '.join(_of(r, p, stage) for r, p in by.items())}" for value, by in by_value.items()]
    set_by = [f"{'  set by' if not i else '':11}{line}" for i, line in enumerate(lines or ["no recipe"])]
    name = _title(key)
    name = name.replace(describe.STAGE, stage, 1) if stage else name
    return [name, f"  takes    {_values(key)}", f"  means    {key.text}", *set_by, ""]


def _of(recipe: str, places: list[str], stage: str) -> str:
    """A recipe, with the stages that are meant where the question was not of one."""
    stages = [p for p in dict.fromkeys(places) if p in STAGES]
    return recipe if stage or not stages else f"{recipe} ({', '.join(stages)})"


def _title(key: Key) -> str:
    return f"{key.name} (kind {key.kind})" if key.kind else key.name


def _values(key: Key) -> str:
    unit = f" [{key.unit}]" if key.unit else ""
    return f"{key.takes}{unit}, " + (key.default if key.default == "must be given" else f"default {key.default}")
