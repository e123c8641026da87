"""When a stage is looked at, and how many looks are still to come."""

from types import SimpleNamespace

import pytest

from cmt_fast.schedule import Schedule
from cmt_fast.train import monitor


@pytest.mark.parametrize(
    "total, eval_every, grid_every, snapshot_every",
    [
        (100, 30, 0, 0),
        (100, 25, 0, 0),
        (90, 10, 30, 0),
        (7, 0, 0, 0),
        (100, 0, 40, 0),
        (100, 25, 40, 0),
        (90, 6, 10, 15),
    ],
)
def test_evaluations_to_come_are_those_that_will_be_due(total, eval_every, grid_every, snapshot_every):
    plan = Schedule(total, 1, 0, 1, 1, snapshot_every=snapshot_every, eval_every=eval_every, grid_every=grid_every)
    stage = SimpleNamespace(schedule=plan)
    for n in range(total + 1):
        due = [m for m in range(n + 1, total + 1) if monitor.due(stage, m, m == total)]
        assert monitor.to_come(stage, n) == len(due)
