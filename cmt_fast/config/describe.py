"""Every key of a recipe in words: type, default, unit, meaning, and which recipes of the package set it.

Types and defaults come from the schema, so what is valid is never written twice; units of names that carry one come from
the name. One sentence a key and the other units are in keys.yaml beside this file. `cmt keys` and docs/keys.md show it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from cmt_fast.config import recipes, scalars
from cmt_fast.config.schema import STAGES, Run, Stage

TEXTS = Path(__file__).with_name("keys.yaml")
STAGE, UNITS = "STAGE", "units"
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "(at least {})"}
ENDINGS = {"_nimg": "images", "_s": "seconds", "_epochs": "epochs"}


class Key(NamedTuple):
    """A key at its place. name: dotted, with STAGE for any stage; kind: the variant that has it, "" where there are none;
    part: the class of the schema that has it there.
    """

    name: str
    kind: str
    takes: str
    default: str
    unit: str
    text: str
    part: type


@functools.cache
def every() -> tuple[Key, ...]:
    """All keys, from the top level down, the variants of a part one after the other. Raises ValueError, see `text_of`."""
    texts = texts_()
    out: list[Key] = []

    def walk(cls: Any, where: str) -> None:
        hints, kind = scalars.hints_of(cls), getattr(cls, "kind", "")
        for f in dataclasses.fields(cls):
            name = f"{where}.{f.name}".lstrip(".")
            below = STAGE if name in STAGES else name
            if f.name != "kind":
                told, text = values(hints[f.name], plain_text), text_of(texts, cls, f.name)
                out.append(Key(name, kind, told, default(f), unit(texts, cls, f.name), text, cls))
            inner = classes(hints[f.name])
            kinds = [c.kind for c in inner if hasattr(c, "kind")]
            if kinds and below not in seen:
                text = "Which variant this is."
                out.append(Key(f"{below}.kind", "", ", ".join(kinds), "must be given", "", text, inner[0]))
            new = [c for c in inner if (c, below) not in seen]
            seen.update([below, *((c, below) for c in new)])
            for c in new:
                walk(c, below)

    seen: set[Any] = set()
    walk(Run, "")
    return tuple(out)


def general(name: str) -> str:
    """A dotted key with STAGE for the name of a stage: what `Key.name` holds."""
    first, dot, rest = name.partition(".")
    return f"{STAGE}.{rest}" if dot and first in STAGES else name


def places(last: str) -> list[str]:
    """The keys whose last name this is, each once."""
    return list(dict.fromkeys(k.name for k in every() if k.name.rpartition(".")[2] == last))


class Setting(NamedTuple):
    """What a recipe of the package sets: its dotted key (`post.lr`), the class of the schema there, the value as written."""

    recipe: str
    name: str
    part: type
    value: str


@functools.cache
def settings() -> tuple[Setting, ...]:
    """All that the recipes of the package set, in their order."""
    return tuple(
        Setting(recipe, name, part, shown(value))
        for recipe in recipes.recipes()
        for name, part, value in _leaves(scalars.parse(recipes.recipe_text(recipe), recipe), Run, "")
    )


def users(key: Key, heirs: bool = False) -> list[Setting]:
    """Where recipes of the package set a key; heirs: in parts that grew from its own too."""
    fits = lambda part: part is key.part or key.name.endswith(".kind") or (heirs and issubclass(part, key.part))
    return [s for s in settings() if general(s.name) == key.name and fits(s.part)]


def _leaves(tree: Any, hint: Any, where: str) -> Iterator[tuple[str, type, Any]]:
    """(dotted key, part of the schema, value) of everything that a recipe sets below a place, in lists of parts too."""
    inner = classes(hint)
    for each in (tree if isinstance(tree, list) else [tree]) if inner else []:
        if not isinstance(each, dict):
            continue
        part = next((c for c in inner if getattr(c, "kind", None) == each.get("kind")), inner[0])
        hints = scalars.hints_of(part)
        for key, value in each.items():
            name = f"{where}.{key}".lstrip(".")
            yield name, part, value
            yield from _leaves(value, hints[key], name)


def shown(value: Any) -> str:
    """A value of a recipe in one line, as YAML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)


def texts_() -> dict[str, dict[str, Any]]:
    """keys.yaml: class -> key -> its sentence, and `units` -> unit -> the keys in it."""
    return scalars.parse(TEXTS.read_text("utf-8"), TEXTS.name)


def parts() -> Iterator[tuple[type, str]]:
    """(class of the schema, where its keys stand), each class once, from the top level down."""
    queue: list[tuple[type, str]] = [(Run, "")]
    seen = {Run}
    while queue:
        cls, where = queue.pop(0)
        yield cls, where
        for key, hint in scalars.hints_of(cls).items():
            for inner in classes(hint):
                if inner not in seen:
                    seen.add(inner)
                    queue.append((inner, STAGE if inner is Stage else f"{where}.{key}".lstrip(".")))


def classes(hint: Any) -> list[Any]:
    """The parts of the schema that a type hint names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [c for inner in get_args(hint) for c in classes(inner)]


def plain_text(part: Any) -> str:
    """A part of the schema as one of the values of a key."""
    return f"kind {part.kind}" if hasattr(part, "kind") else "its keys"


def values(hint: Any, part: Any, quote: str = "") -> str:
    """What may stand at a key, in words. part: how a part of the schema is named; quote: what stands around a word."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [m for field in inner[1:] if isinstance(field, FieldInfo) for m in field.metadata]
        told = [form.format(f"{getattr(m, k):g}") for m in limits for k, form in BOUNDS.items() if hasattr(m, k)]
        return " ".join([values(inner[0], part, quote), " and ".join(told)]).strip()
    if origin is Literal:
        return ", ".join(f"{quote}{v}{quote}" for v in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(values(v, part, quote) for v in inner)
    if origin is tuple:
        many = inner[1:] == (Ellipsis,)
        return f"list{'' if many else f' of {len(inner)}'}: {values(inner[0], part, quote)}"
    if origin is dict:
        return f"mapping from {values(inner[0], part, quote)} to {values(inner[1], part, quote)}"
    if dataclasses.is_dataclass(hint):
        return part(hint)
    return "null" if hint is type(None) else WORDS[hint]


def default(field: dataclasses.Field) -> str:
    """What stands at a key that a recipe leaves out, as YAML has it."""
    value = field.default
    if isinstance(value, FieldInfo):
        value = value.get_default(call_default_factory=True)
    return "must be given" if value is dataclasses.MISSING else plain(value)


def plain(value: Any) -> str:
    """A default as YAML would have it, in one line."""
    if dataclasses.is_dataclass(value):
        kind = getattr(value, "kind", None)
        return f"{{kind: {kind}}}" if kind else "{}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def unit(texts: dict, cls: type, key: str) -> str:
    """What a key is counted in, by its name or by keys.yaml; "" for what has no unit."""
    named = {f"{c.__name__}.{key}" for c in cls.__mro__}
    stated = next((u for u, of in texts.get(UNITS, {}).items() if named & set(of)), "")
    return stated or next((u for ending, u in ENDINGS.items() if key.endswith(ending)), "")


def text_of(texts: dict, cls: type, key: str = "") -> str:
    """The sentence of a key, or ("") of a whole part; a class inherits its parent's. Raises ValueError where there is none."""
    for c in cls.__mro__:
        if (key or "_") in texts.get(c.__name__, {}):
            return " ".join(str(texts[c.__name__][key or "_"]).split())
    raise ValueError(f"{TEXTS.name}: {cls.__name__}.{key or '_'} has no text")


def check_texts() -> None:
    """Raises ValueError where keys.yaml speaks of a key that the schema has not, in a sentence or a unit."""
    texts = texts_()
    known = {f"{cls.__name__}.{key}" for cls, _ in parts() for key in ("_", *(f.name for f in dataclasses.fields(cls)))}
    units = texts.pop(UNITS, {})
    said = {f"{cls}.{key}" for cls, sentences in texts.items() for key in sentences} | {
        k for of in units.values() for k in of
    }
    if said - known:
        raise ValueError(f"{TEXTS.name}: {', '.join(sorted(said - known))}: the schema has no such key")
