"""Which keys of a run name files and folders, and what their relative paths are relative to.

A recipe's relative paths start from one folder, its root: `cmt train --root`, else CMT_ROOT, else where the command was given. A
run keeps its root, so that it finds its data wherever it is read from; what has moved besides is said with the key itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.loading import build, dump
from cmt_fast.config.schema import Run

VARIABLE = "CMT_ROOT"
OF_RUN = (("data", "path"), ("eval", "reference"), ("eval", "weights"))
OF_STAGE = (("trajectories", "cache"), ("perceptual", "weights"), ("perceptual", "heads"))
# a name of a hub, or a word, where there is no such file
MAYBE = (("eval", "vae"), ("eval", "labels"))


def given(root: Path | None) -> Path | None:
    """The root as asked for, by the option or CMT_ROOT; None for the current folder. Raises ConfigError for no folder."""
    asked = root or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if asked is not None and not asked.is_dir():
        raise ConfigError(f"{'--root' if root else VARIABLE}: {str(asked)!r} is not a folder")
    return asked


def rebased(run: Run, root: Path, found: bool = False) -> Run:
    """The run with its relative paths from `root`; found: only those that are there."""
    if root.resolve() == Path.cwd():
        return run
    tree, moved = dump(run), False
    for table, key, sure in _places(tree):
        path = root / table[key]
        there = os.path.exists(path)  # not so in a folder that others may not look into
        if not Path(table[key]).is_absolute() and ((sure and not found) or there):
            table[key], moved = str(path), True
    return build(tree) if moved else run


def without(facts: dict[str, Any]) -> dict[str, Any]:
    """A copy of a dumped run, or of a stage's facts, in which nothing says where a file is: what it holds is compared.

    Whether there is one at all stays, as a stage with cached trajectories is not one that rolls out its own.
    """
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in facts.items()}
    for name, table in out.items():
        if not isinstance(table, dict):
            continue
        for part in {first for first, _ in OF_STAGE} & set(table):
            table[part] = dict(table[part]) if isinstance(table[part], dict) else table[part]
        for inner, key, _ in _places({name: table}):
            inner[key] = "a path"
    return out


def unplaced(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of a dumped run with the names of files and folders alone: for what is given away, of no machine in particular."""
    out = json.loads(json.dumps(tree))
    for table, key, sure in _places(out):
        if sure or Path(table[key]).is_absolute():  # else a hub's name, or a word
            table[key] = Path(table[key]).name
    return out


def _places(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """(table, key, whether it is a path for sure) of every path that a dumped run names."""
    for table, key in (*OF_RUN, *MAYBE):
        if isinstance(tree.get(table), dict) and isinstance(tree[table].get(key), str):
            yield tree[table], key, (table, key) in OF_RUN
    for stage in tree.values():
        for part, key in OF_STAGE if isinstance(stage, dict) else ():
            inner = stage.get(part)
            if isinstance(inner, dict) and isinstance(inner.get(key), str):
                yield inner, key, True
