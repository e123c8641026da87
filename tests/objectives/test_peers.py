"""Our losses beside those of the projects they come from: the same numbers and gradients, recorded from their own code."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cmt_fast.config.schema.objective import Objective
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.objectives import OBJECTIVES, StageContext, sets
from tests.objectives import peers


def fields(record: dict[str, Any]) -> Any:
    """The objective's own `Drawn` of what was recorded; whole numbers are labels, true and false what is dropped."""
    return _filled(typing.get_type_hints(OBJECTIVES[record["kind"]].loss)["drawn"], record["drawn"])


def _filled(drawn: Any, numbers: dict[str, Any]) -> Any:
    """A `Drawn` by the names of its fields; one that is part of another by its own."""
    of = lambda v: v if v is None or isinstance(v, str) else _tensor(v)
    parts = {name: hint for name, hint in typing.get_type_hints(drawn).items() if hasattr(hint, "_fields")}
    return drawn(**{n: _filled(parts[n], numbers) if n in parts else of(numbers.get(n)) for n in drawn._fields})


def _tensor(numbers: Any) -> Tensor:
    found = torch.tensor(numbers)
    return torch.tensor(numbers, dtype=torch.float64) if found.is_floating_point() else found


@pytest.mark.parametrize("record", peers.records(), ids=lambda record: record["name"])
def test_loss_is_that_of_the_project_it_comes_from(record: dict[str, Any]) -> None:
    """Loss by row, or by set, and gradient in every number of the network, to 1e-6 of their largest."""
    kind, path = record["kind"], record["path"]
    config = TypeAdapter(Objective).validate_python({"kind": kind, **record["config"]})
    net = peers.network(record.get("network", path))
    teacher = peers.network(path, 0.5).requires_grad_(False) if record["teacher"] else None
    loss, _ = OBJECTIVES[kind].loss(net, fields(record), config, StageContext(ProbabilityPath(path), teacher))
    if record.get("each") == "set":
        loss = sets.gathered(loss, record["config"]["group"]).mean(1)
    grad = torch.autograd.grad(loss.mean(), list(net.parameters()), materialize_grads=True)
    scale = record.get("scale", 1.0)
    for ours, theirs in ((loss, record["loss"]), (torch.cat([g.flatten() for g in grad]), record["grad"])):
        theirs = torch.tensor(theirs, dtype=torch.float64)
        assert float((scale * ours.detach() - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max()), kind
