"""Every recipe key as a page: its values and default from the schema, one sentence of text from docs/keys.yaml.

The schema says what is valid, so it is never written twice. The text is apart from it, because it is prose; a key without
a sentence, or a sentence without a key, is an error.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo

from cmt_fast.config.schema import Run, Stage

TEXTS = Path("docs/keys.yaml")
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "(at least {})"}


def table(_: str = "") -> str:
    """All sections: the run, then each part in the order in which the keys name them. Raises ValueError, see `text_of`."""
    texts = yaml.safe_load(TEXTS.read_text("utf-8"))
    out, used = [], set()
    for cls, where in parts():
        kind = getattr(cls, "kind", None)
        title = f"`{where}`" if where else "A recipe's top level"
        title += f" with `kind: {kind}`" if kind else ""
        parent = next((c for c in cls.__mro__[1:] if dataclasses.is_dataclass(c)), None)
        out += [f'\n<a id="{cls.__name__.lower()}"></a>', f"### {title}\n", text_of(texts, cls, "", used) + "\n"]
        if parent:
            out[-1] += f"\nIt has the keys of [`{parent.kind}`](#{parent.__name__.lower()}) too.\n"
        lines = [
            f"| `{f.name}` | {values(get_type_hints(cls, include_extras=True)[f.name])} | {default(f)} "
            f"| {text_of(texts, cls, f.name, used)} |"
            for f in dataclasses.fields(cls)
            if f.name != "kind" and not (parent and _same(f, parent))
        ]
        if lines:
            out += ["| key | values | default | what it does |", "|---|---|---|---|", *lines]
    spare = {f"{c}.{k}" for c, keys in texts.items() for k in keys} - used
    if spare:
        raise ValueError(f"{TEXTS}: {', '.join(sorted(spare))}: the schema has no such key")
    return "\n".join(out).lstrip("\n") + "\n\n"


def parts() -> Iterator[tuple[type, str]]:
    """(class of the schema, where its keys stand), each class once, from the top level down."""
    queue: list[tuple[type, str]] = [(Run, "")]
    seen = {Run}
    while queue:
        cls, where = queue.pop(0)
        yield cls, where
        for key, hint in get_type_hints(cls, include_extras=True).items():
            for inner in classes(hint):
                if inner not in seen:
                    seen.add(inner)
                    queue.append((inner, "STAGE" if inner is Stage else f"{where}.{key}".lstrip(".")))


def classes(hint: Any) -> list[type]:
    """The parts of the schema that a type hint names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [c for inner in get_args(hint) for c in classes(inner)]


def values(hint: Any) -> str:
    """What may stand at a key, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [m for field in inner[1:] if isinstance(field, FieldInfo) for m in field.metadata]
        told = [form.format(f"{getattr(m, k):g}") for m in limits for k, form in BOUNDS.items() if hasattr(m, k)]
        return " ".join([values(inner[0]), " and ".join(told)]).strip()
    if origin is Literal:
        return ", ".join(f"`{v}`" for v in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(values(v) for v in inner)
    if origin is tuple:
        many = inner[1:] == (Ellipsis,)
        return f"list{'' if many else f' of {len(inner)}'}: {values(inner[0])}"
    if origin is dict:
        return f"mapping from {values(inner[0])} to {values(inner[1])}"
    if dataclasses.is_dataclass(hint):
        name = getattr(hint, "kind", None) or "its keys"
        return f"[{name}](#{hint.__name__.lower()})"
    return "null" if hint is type(None) else WORDS[hint]


def default(field: dataclasses.Field) -> str:
    """What stands at a key that a recipe leaves out."""
    value = field.default
    if isinstance(value, FieldInfo):
        value = value.default_factory()
    if value is dataclasses.MISSING:
        return "must be given"
    return f"`{plain(value)}`"


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


def text_of(texts: dict, cls: type, key: str, used: set[str]) -> str:
    """The sentence of a key, or ("") of a whole part; a class inherits its parent's. Raises ValueError where there is none."""
    for c in cls.__mro__:
        name = key or "_"
        if name in texts.get(c.__name__, {}):
            used.add(f"{c.__name__}.{name}")
            return " ".join(str(texts[c.__name__][name]).split()).replace("|", "\\|")
    raise ValueError(f"{TEXTS}: {cls.__name__}.{key or '_'} has no text")


def _same(field: dataclasses.Field, parent: type) -> bool:
    """Whether a parent class has this very key: equal type and default."""
    other = {f.name: f for f in dataclasses.fields(parent)}.get(field.name)
    return other is not None and (other.type, other.default) == (field.type, field.default)
