"""A plugin of pytest for the emulated library (emulated.py): every test once in each order of blocks and threads.

In one process, where what a test compares with is computed once for both.
"""

from __future__ import annotations

import pytest

ORDERS = ("forward", "reverse")


@pytest.fixture(autouse=True, params=ORDERS)
def order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMT_EMULATED_ORDER", request.param)
