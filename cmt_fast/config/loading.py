"""From YAML and `a.b=value` overrides to a Run, and the one-line errors on the way.

A wrong key or value raises ConfigError: the key, what it was, what is valid, the nearest name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.recipes import recipe_text
from cmt_fast.config.renames import renamed, today
from cmt_fast.config.schema import Run


class _Loader(yaml.SafeLoader):
    """safe_load with YAML 1.2 floats (1e-3 is a number) and duplicate keys refused."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    out: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int)):
            raise ConfigError(f"key {key!r} in line {key_node.start_mark.line + 1} is not a name")
        if key in out:
            raise ConfigError(f"{key}: appears twice, again in line {key_node.start_mark.line + 1}")
        out[key] = loader.construct_object(value_node, deep=True)
    return out


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """YAML to plain Python. Raises ConfigError naming `source` and the line."""
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}:{where} is not valid YAML ({getattr(error, 'problem', None) or error})") from None


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The resolved run of a recipe (name or path) and `a.b=value` overrides. Raises ConfigError."""
    tree = parse_yaml(recipe_text(recipe), recipe)
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe: {recipe!r} holds no mapping at its top level")
    tree, notes = renamed(tree)
    for override in overrides:
        notes += _override(tree, override)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return build(tree)


def build(tree: dict) -> Run:
    """A Run from plain data, keys under their names of before too. Raises ConfigError for the first thing that is wrong."""
    try:
        return TypeAdapter(Run).validate_python(renamed(tree)[0])
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _override(tree: dict, text: str) -> list[str]:
    """Set one key, whatever its name was; a note where it has another today, for which a recipe may stand already."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: {text!r} is not of the form a.b=value")
    *parents, last = key.split(".")
    node = tree
    for i, name in enumerate(parents):
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(parents[: i + 1])}: is {child!r}, it has no key {parents[i + 1 :] + [last]}")
        node = child
    now = today(tuple(parents), last)
    node[now], notes = renamed(parse_yaml(raw, f"override {key}"), (*parents, now))
    return notes + ([f"{key} is now {'.'.join((*parents, now))}"] if now != last else [])


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
        return _plain(get_type_hints(cls, include_extras=True).get(part))
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
    words = [e["loc"][-1] for e in error.errors() if str(e["loc"][-1]).startswith("literal[")]  # a number or a word
    if words:
        loc = loc[:-1]
    key = _key(loc)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _fields(Run, loc[:-1])
        return f"{key}: unknown key; valid are {', '.join(valid)}{nearest(loc[-1], valid)}"
    if kind in ("missing", "missing_argument"):
        return f"{key}: is missing"
    if kind in ("union_tag_invalid", "literal_error"):
        valid = re.findall(r"'([^']*)'", first["ctx"].get("expected_tags") or first["ctx"].get("expected") or "")
        bad = first["ctx"].get("tag", given)
        key = f"{key}.kind" if kind == "union_tag_invalid" else key
        return f"{key}: {bad!r} is not valid; valid are {', '.join(valid)}{nearest(bad, valid)}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: is missing; it names which of the variants this is"
    shown = json.dumps(given, default=str)
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    other = f", or {str(words[0])[8:-1]}" if words else ""
    return f"{key}: {shown} is not valid; {first['msg'][0].lower()}{first['msg'][1:]}{other}"
