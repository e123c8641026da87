"""Every recipe key as a page: what `cmt keys` says, as tables. The words are config/describe.py's."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from cmt_fast.config import describe, recipes
from cmt_fast.config.describe import Key

FEW = 3  # recipes that are named one by one in a cell


def table(_: str = "") -> str:
    """All sections: the run, then each part in the order in which the keys name them. Raises ValueError, see `describe`."""
    describe.check_texts()
    texts, out = describe.texts_(), []
    for cls, where in describe.parts():
        kind = getattr(cls, "kind", None)
        title = f"`{where}`" if where else "A recipe's top level"
        title += f" with `kind: {kind}`" if kind else ""
        parent: Any = next((c for c in cls.__mro__[1:] if dataclasses.is_dataclass(c)), None)
        text = _cell(describe.text_of(texts, cls))
        out += [f'\n<a id="{cls.__name__.lower()}"></a>', f"### {title}\n", text + "\n"]
        if parent:
            out[-1] += f"\nIt has the keys of [`{parent.kind}`](#{parent.__name__.lower()}) too.\n"
        own = [f for f in dataclasses.fields(cls) if f.name != "kind" and not (parent and _same(f, parent))]
        if own:
            out += ["| key | type | default | unit | what it does | set by |", "|---|---|---|---|---|---|"]
            out += [_row(texts, cls, where, f) for f in own]
    return "\n".join(out).lstrip("\n") + "\n\n"


def _row(texts: dict, cls: type, where: str, field: dataclasses.Field) -> str:
    type_ = describe.values(get_type_hints(cls, include_extras=True)[field.name], _part, "`")
    default, unit = describe.default(field), describe.unit(texts, cls, field.name)
    default = default if default == "must be given" else f"`{default}`"
    text = _cell(describe.text_of(texts, cls, field.name))
    key = Key(f"{where}.{field.name}".lstrip("."), getattr(cls, "kind", ""), "", "", "", "", cls)
    return f"| `{field.name}` | {type_} | {default} | {unit} | {text} | {_users(key)} |"


def _part(cls: Any) -> str:
    return f"[{getattr(cls, 'kind', None) or 'its keys'}](#{cls.__name__.lower()})"


def _users(key: Key) -> str:
    known, names = list(recipes.recipes()), list(dict.fromkeys(s.recipe for s in describe.users(key, heirs=True)))
    if len(names) > FEW:
        return "all" if names == known else f"{len(names)} of {len(known)}"
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _same(field: dataclasses.Field, parent: type) -> bool:
    """Whether a parent class has this very key: equal type and default."""
    other = {f.name: f for f in dataclasses.fields(parent)}.get(field.name)
    return other is not None and (other.type, other.default) == (field.type, field.default)
