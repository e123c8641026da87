"""From YAML and `a.b=value` overrides to a Run, and the one-line errors on the way.

What a word means is scalars.py's, how an override is written overrides.py's, what a key is called elsewhere synonyms.py's.
A wrong key or value raises ConfigError: the key, what it was, what is valid, the nearest name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from cmt_fast.config import scalars, secrets, synonyms
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.overrides import apply as override
from cmt_fast.config.recipes import recipe_text
from cmt_fast.config.renames import renamed
from cmt_fast.config.schema import Run

KIND = re.compile(r"\s*[\w.]+\.kind\s*=")


def parse_yaml(text: str, source: str) -> Any:
    """YAML to plain Python, words by their looks. Raises ConfigError naming `source` and the line."""
    return scalars.natural(scalars.parse(text, source))


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The resolved run of a recipe (name or path) and `a.b=value` overrides. Raises ConfigError."""
    tree = scalars.parse(recipe_text(recipe), recipe)
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe: {recipe!r} holds no mapping at its top level")
    ours = {"run", "digest"} <= set(tree)  # a run's run.json: the recipe as it was resolved
    if ours:
        tree = tree["run"]
    tree, notes = renamed(tree)
    before = copy.deepcopy(tree)
    notes += override(tree, overrides) + _inherited(before, tree, overrides)
    if not ours or overrides:
        secrets.refuse(tree)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return build(tree)


def _inherited(before: dict, tree: dict, overrides: list[str] | tuple[str, ...]) -> list[str]:
    """A note for each `a.kind=other` whose variant goes on with numbers that the recipe chose for the one before.

    Raises ConfigError where the recipe has keys there that the other does not have.
    """
    notes = []
    for place in dict.fromkeys(t.partition("=")[0].strip().removesuffix(".kind") for t in overrides if KIND.match(t)):
        old, new, hint = _at(before, place), _at(tree, place), _plain(Run)
        for part in place.split("."):
            hint = _step_into(hint, part)
        kind, was = (node.get("kind") if isinstance(node, dict) else None for node in (new, old))
        variant = _step_into(hint, kind)
        if was in (None, kind) or not dataclasses.is_dataclass(variant):
            continue
        own = {f.name: f.default for f in dataclasses.fields(variant)}
        set_here = {t.partition("=")[0].strip() for t in overrides}
        kept = {k: v for k, v in old.items() if k != "kind" and new.get(k) == v and f"{place}.{k}" not in set_here}
        whole = f"{place}={{kind: {kind}}} takes its own defaults"
        if alien := [key for key in kept if key not in own]:
            raise ConfigError(
                f"{place}.kind: {kind} has no {', '.join(alien)}, which the recipe sets for {was}; {whole}"
            )
        shown = [f"{k} {scalars.natural(v)}" for k, v in kept.items() if _listed(scalars.natural(v)) != _listed(own[k])]
        if shown:
            notes.append(f"{place}.kind: {kind} goes on with {', '.join(shown)} of the recipe's {was}; {whole}")
    return notes


def _at(tree: Any, place: str) -> Any:
    for part in place.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def build(tree: dict) -> Run:
    """A Run from plain data, keys under their names of before too. Raises ConfigError for the first thing that is wrong."""
    try:
        return TypeAdapter(Run).validate_python(scalars.typed(renamed(tree)[0], Run))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def dump(run: Run) -> dict:
    """Plain data (JSON types) that `build` reads back to an equal Run."""
    return json.loads(json.dumps(dataclasses.asdict(cast(Any, run))))


def _fields(cls: Any, loc: tuple) -> list[str]:
    """The valid keys at a place in the schema, for the message of an unknown key."""
    for part in loc:
        cls = cls if isinstance(part, int) else _step_into(cls, part)  # a number is a place in a list
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _key(loc: tuple) -> str:
    """An error's place as a key, without the tags of unions that pydantic puts between."""
    cls: Any = Run
    names = []
    for part in loc:
        tag = isinstance(cls, tuple) and any(getattr(c, "kind", None) == part for c in cls)
        names += [] if tag else [str(part)]
        cls = cls if isinstance(part, int) else _step_into(cls, part)
    return ".".join(names)


def _step_into(cls: Any, part: Any) -> Any:
    if dataclasses.is_dataclass(cls) and isinstance(part, str):
        return _plain(scalars.hints_of(cast(Any, cls)).get(part))
    if isinstance(cls, tuple):  # members of a tagged union, `part` is the tag
        return next((c for c in cls if getattr(c, "kind", None) == part), None)
    return None


def _plain(hint: Any) -> Any:
    """A dataclass, or the tuple of dataclasses of a union, behind Annotated, None and tuple[X, ...]."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    members = [a for a in get_args(hint) if a not in (type(None), Ellipsis)] or [hint]
    members = (
        [m for a in members for m in (_plain(a) if isinstance(_plain(a), tuple) else (_plain(a),))]
        if get_args(hint)
        else members
    )
    return members[0] if len(members) == 1 else tuple(members)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    loc, kind, given = first["loc"], first["type"], first.get("input")
    if not loc:  # pydantic names no place where a key itself is no Unicode
        return f"recipe: {ascii(given)} is not valid; {first['msg'][0].lower()}{first['msg'][1:]}"
    ends = [e["loc"][-1] for e in error.errors() if e["loc"]]
    words = [end for end in ends if str(end).startswith("literal[")]  # a number or a word
    if words:
        loc = loc[:-1]
    key = _key(loc)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _fields(Run, loc[:-1])
        return f"{key}: {synonyms.unknown(key, valid)}"
    if kind in ("missing", "missing_argument"):
        return f"{key}: is missing"
    if kind in ("union_tag_invalid", "literal_error"):
        expected = first["ctx"].get("expected_tags") or first["ctx"].get("expected") or ""
        valid = [word.strip("'") for word in re.split(r", | or ", expected)]
        bad = first["ctx"].get("tag", given)
        key = f"{key}.kind" if kind == "union_tag_invalid" else key
        return f"{key}: {bad!r} is not valid; valid are {', '.join(valid)}{nearest(bad, valid)}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: is missing; it names which of the variants this is"
    shown = json.dumps(given, default=str)
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    other = f", or {str(words[0])[8:-1]}" if words else ""
    return f"{key}: {shown} is not valid; {first['msg'][0].lower()}{first['msg'][1:]}{other}"
