"""Mid-training's own questions, asked of the same machine with one objective for each path. Filled below."""

from __future__ import annotations

QUESTIONS: dict = {}


def named(name):
    return list(QUESTIONS) if name == "all" else [name]


def cells_of(machine, suite, name, seeds):
    return []
