"""What is published of each recipe beside what the recipe has, key by key: docs/published.yaml as a table.

A value that differs has a `why`, one that agrees has none; `published: null` is a key of which nothing is published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cmt_fast.config import loading

TEXTS = Path("docs/published.yaml")


class Setting(NamedTuple):
    """A key of a recipe: published is None where nothing is; why: None where both agree."""

    recipe: str
    key: str
    published: Any
    source: str
    ours: Any
    why: str | None

    @property
    def agrees(self) -> bool:
        """Whether ours is what is published."""
        return self.published is not None and self.published == self.ours


def settings() -> Iterator[Setting]:
    """All rows, a recipe at a time. Raises ValueError for a row with other parts, or a source that is not in `sources`."""
    data = yaml.safe_load(TEXTS.read_text("utf-8"))
    for group in data["rows"]:
        for recipe in group["recipes"]:
            tree = loading.dump(loading.load(recipe))
            for row in group["keys"]:
                if not {"key", "published", "source"} <= set(row) <= {"key", "published", "source", "why"}:
                    raise ValueError(f"{TEXTS}: {row} needs key, published and source, and may have why")
                if row["source"].partition(":")[0] not in data["sources"]:
                    raise ValueError(
                        f"{TEXTS}: the source of {row['key']}, {row['source']!r}, begins with none of `sources`"
                    )
                yield Setting(
                    recipe, row["key"], row["published"], row["source"], value(tree, row["key"]), row.get("why")
                )


def value(tree: Any, key: str) -> Any:
    """What stands at a dotted key of a dumped run; a number in it is a place in a list. Raises KeyError where nothing does."""
    for part in key.split("."):
        if isinstance(tree, (list, tuple)):
            tree = tree[int(part)]
        else:
            tree = tree[part] if part in tree else tree[int(part)]
    return list(tree) if isinstance(tree, tuple) else tree


def table(_: str = "") -> str:
    """The sources, and for each recipe its keys. Raises ValueError where a row's `why` and its values do not go together."""
    out = ["Sources:\n"]
    out += [f"- **{name}**: {what}" for name, what in yaml.safe_load(TEXTS.read_text("utf-8"))["sources"].items()]
    last = ""
    for row in sorted(settings(), key=lambda s: s.recipe):
        if row.agrees != (row.why is None):
            raise ValueError(
                f"{TEXTS}: {row.recipe}, {row.key}: published {row.published}, ours {row.ours}, why {row.why}"
            )
        if row.recipe != last:
            out += [
                f"\n### {row.recipe}\n",
                "| key | published | ours | source | why ours differs |",
                "|---|---|---|---|---|",
            ]
            last = row.recipe
        theirs = "not published" if row.published is None else f"`{_plain(row.published)}`"
        source = row.source.replace("*", "\\*")
        out.append(
            f"| `{row.key}` | {theirs} | `{_plain(row.ours)}` | {source} | {row.why or ''} |".replace("  |", " |")
        )
    return "\n".join(out) + "\n\n"


def _plain(value: Any) -> str:
    """A value as YAML has it, in one line; whole numbers with their thousands apart."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{int(value):,}" if value == int(value) else f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)
