"""Which attention a stage takes: chosen when it begins, kept in its checkpoints, the same when it goes on.

On a CPU softmax or SDPA of few tokens (`cmt_kernels.attention.small`). On a GPU, for a stage none of whose rows has a tangent,
our kernels or a library of torch's, forward and backward (`primal.trained`): where a Dual is, its value must be bitwise the
plain one. The choice is by time and moves last bits. So it is made once a stage, by
rank 0 for all, and stands in every manifest; a stage that is taken up again, on this machine or another, reads it from there.
"""

from __future__ import annotations

import os

import torch
from cmt_kernels import processor, table
from cmt_kernels.attention import small

from cmt_fast.config.schema import Stage
from cmt_fast.objectives import OBJECTIVES
from cmt_fast.run.networks import attentions
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint


@progress.phase("choosing attention by time", quiet=True)
def settle(work: Workspace, stage: Stage, found: checkpoint.Checkpoint | None) -> dict[str, str]:
    """{shape: name} of a stage's attentions; {} where nothing is chosen. Every rank must call it.

    found: the checkpoint that the stage goes on from; one that says nothing is of a version that knew SDPA alone.
    """
    if found:
        return dict(found.manifest.get("attention", {}))
    if stage.compile:
        return {}
    if work.device.type == "cuda":
        return {} if OBJECTIVES[stage.objective.kind].tangents else _on_a_gpu(work, stage)
    if work.device.type != "cpu" or not distributed.smallest(int(processor.timed())):
        return {}
    low = stage.products == "bf16" or (stage.trajectories and stage.trajectories.precision in ("auto", "bf16", "fp8"))
    dtypes = (torch.float32, torch.bfloat16) if low else (torch.float32,)
    shapes = [(t, d) for t, d in attentions(work.run, work.data.shape, work.data.classes) if t <= small.TOKENS]
    choices = {}
    for tokens, dim in shapes:
        for dtype in dtypes:
            mine = small.choose(tokens, dim, dtype) if distributed.rank() == 0 else small.SDPA
            choices[small.label(tokens, dim, dtype)] = _of_the_first(mine, small.NAMES)
    return choices


def _on_a_gpu(work: Workspace, stage: Stage) -> dict[str, str]:
    """What trains a stage without tangents there, where the op is ours and nobody has forced a library."""
    from cmt_kernels.attention import primal

    if table("cuda")["attention"] != "triton" or os.environ.get("CMT_ATTENTION"):
        return {}
    dtype, choices = torch.bfloat16 if stage.products == "bf16" else torch.float32, {}
    for tokens, dim in attentions(work.run, work.data.shape, work.data.classes):
        mine = primal.trained(tokens, dim, dtype, work.device) if distributed.rank() == 0 else "triton"
        choices[small.label(tokens, dim, dtype)] = _of_the_first(mine, small.TRAINED)
    return choices


def _of_the_first(mine: str, names: tuple[str, ...]) -> str:
    """What rank 0 chose of these names, on every rank."""
    return names[int(distributed.every_rank([float(names.index(mine))])[0][0])]
