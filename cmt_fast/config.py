"""From YAML and `a.b=value` overrides to a Run, and the one-line errors on the way.

A wrong key or value raises ConfigError: the key, what it was, what is valid, the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from cmt_fast import schema
from cmt_fast.schema import Run

# keys of a stage that change no weight, or its rounding alone as the number of processes does
WATCHING = ("checkpoint_every_nimg", "eval_every_nimg", "grid_every_nimg", "micro_batch")
# keys of a run that say where and how it is computed
WHERE = ("device", "loader", "tensorboard", "engine", "zero_stage", "zero_teacher", "timeout_s")

# the tags of all unions, which pydantic puts between the keys of an error's place
_KINDS = {kind for part in vars(schema).values() if isinstance(kind := getattr(part, "kind", None), str)}


class ConfigError(ValueError):
    """What a user typed is wrong: one line that names the key, what it was and what is valid."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


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


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = resources.files("cmt_fast") / "recipes"
    return {p.stem: p for p in sorted(Path(str(folder)).glob("*.yaml"))}


def recipe_text(recipe: str) -> str:
    """The YAML of a recipe by name or by path. Raises ConfigError with the nearest name."""
    known = recipes()
    path = known.get(recipe) or Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe: {recipe!r} is no file and none of {', '.join(known)}{nearest(recipe, known)}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe: {recipe!r} cannot be read ({error})") from None


def load(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The resolved run of a recipe (name or path) and `a.b=value` overrides. Raises ConfigError."""
    tree = parse_yaml(recipe_text(recipe), recipe)
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe: {recipe!r} holds no mapping at its top level")
    for override in overrides:
        _override(tree, override)
    return build(tree)


def build(tree: dict) -> Run:
    """A Run from plain data. Raises ConfigError for the first thing that is wrong."""
    try:
        return TypeAdapter(Run).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _override(tree: dict, text: str) -> None:
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
    node[last] = parse_yaml(raw, f"override {key}")


def dump(run: Run) -> dict:
    """Plain data (JSON types) that `build` reads back to an equal Run."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def digest(run: Run) -> str:
    """sha256 of the resolved run, without what does not change its numbers: where and in what parts it is computed."""
    tree = {k: v for k, v in dump(run).items() if k not in WHERE}
    for stage in tree.values():
        if isinstance(stage, dict):
            stage.pop("micro_batch", None)
    return _sha(tree)


def stage_facts(run: Run, name: str) -> dict:
    """All of a run that a stage's weights depend on: data, model, path, seed, its own settings and its ancestors'.

    Of what lies outside the run only the name is in it; its checksums are in the stage's manifest. How often it is
    looked at or saved is not in it: that may change while a stage is under way.
    """
    tree = dump(run)
    facts = {k: tree[k] for k in ("data", "model", "path", "sigma_data", "seed")}
    queue = [name]
    while queue:
        member = queue.pop(0)
        facts[member] = {k: v for k, v in tree[member].items() if k not in WATCHING}
        parents = run.stage(member).networks().values()
        queue += [p for p in parents if "/" not in p and p not in facts]
    return facts


def stage_digest(run: Run, name: str, others: dict | None = None) -> str:
    """sha256 of `stage_facts` and of what the stage reads outside its run: equal digests mean equal weights."""
    return _sha(stage_facts(run, name) | ({"others": others} if others else {}))


def _sha(tree: dict) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def changed(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The dotted keys in which two dumped runs differ, as `key: old -> new`."""
    out = []
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += changed(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a} -> {b}")
    return out


# ---------------------------------------------------------------------------------------------- error text


def nearest(name: str, valid) -> str:
    """The end of an error line: "; did you mean ...?" or nothing."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _fields(cls, loc: tuple) -> list[str]:
    """The valid keys at a place in the schema, for the message of an unknown key."""
    for part in loc:
        cls = _step_into(cls, part)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _step_into(cls, part):
    if dataclasses.is_dataclass(cls) and isinstance(part, str):
        return _plain(get_type_hints(cls, include_extras=True).get(part))
    if isinstance(cls, tuple):  # members of a tagged union, `part` is the tag
        return next((c for c in cls if getattr(c, "kind", None) == part), None)
    return None


def _plain(hint):
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
    key = ".".join(
        str(p) for i, p in enumerate(loc) if not (p in _KINDS and i and not isinstance(loc[i - 1], int | None))
    )
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
    other = f", or {words[0][8:-1]}" if words else ""
    return f"{key}: {shown} is not valid; {first['msg'][0].lower()}{first['msg'][1:]}{other}"
