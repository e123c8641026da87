"""Figures of recipes' tests are of a few samples, and nobody reads their intervals: test_measures.py holds those."""

from __future__ import annotations

import pytest

from cmt_fast.evaluation import measures


@pytest.fixture(autouse=True)
def few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of samples: twenty cost a root of two covariances each, for every figure of every stage."""
    monkeypatch.setattr(measures, "GROUPS", 2)
