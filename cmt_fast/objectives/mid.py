"""Mid-training for any objective: one rule, read off what the objective asks its network for.

Post-training asks a network for a flow map at times of its own law. Mid-training asks the same network for the same map at
the nodes of the teacher's trajectories, where the answer stands: the state at the later node. So the path says in what form
(the endpoint itself on "ve", an average velocity on "linear"), and what the objective `asks` which nodes are asked about
(`Run.asked`):

    "end"               from any node to the last
    "pairs", "instant"  from any node to any later one
    "halves"            between nodes whose times differ by a power of 1/2

The anchor of post-training is the same loss on the same nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import CmtCm, CmtMf
from cmt_fast.objectives import OBJECTIVES


def prepares(objective: Any, path: str) -> CmtCm | CmtMf:
    """The objective of mid-training, and of an anchor, that prepares a network of this path for `objective`.

    Raises ConfigError where the objective does not live on this path.
    """
    if not OBJECTIVES[objective.kind].on(path):
        raise ConfigError(f"objective.kind: {objective.kind!r} is not for the path {path!r}")
    return CmtCm() if path == "ve" else CmtMf()


@functools.lru_cache(maxsize=64)
def _table(times: tuple[float, ...], which: str) -> Tensor:
    t = torch.tensor(times, dtype=torch.float64)
    i, j = torch.triu_indices(len(times), len(times), offset=1)
    if which == "end":
        keep = j == len(times) - 1
    elif which == "halves":
        exponent = (t[i] - t[j]).log2()
        keep = (exponent - exponent.round()).abs() < 1e-6
    else:
        keep = torch.ones_like(i, dtype=torch.bool)
    return torch.stack((i[keep], j[keep]))


def pairs(times: Sequence[float], which: str) -> Tensor:
    """Indices i < j of the nodes at these falling times that are asked about: (2, n). Raises ConfigError where there are none."""
    found = _table(tuple(times), which)
    if not found.shape[1]:
        shown = ", ".join(f"{t:g}" for t in times)
        raise ConfigError(f"no two of the times {shown} differ by a power of 1/2; take shift 1 and t_min 0", "pairs")
    return found
