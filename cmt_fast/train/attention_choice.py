"""Which attention a stage takes on a CPU: chosen when it begins, kept in its checkpoints, the same when it goes on.

The choice is by time on this processor (`cmt_kernels.attention.small`) and moves last bits. So it is made once a stage, by
rank 0 for all, and stands in every manifest; a stage that is taken up again, on this machine or another, reads it from there.
"""

from __future__ import annotations

import torch
from cmt_kernels import processor
from cmt_kernels.attention import small

from cmt_fast.config.schema import Stage
from cmt_fast.run.networks import attentions
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.storage import checkpoint


def settle(work: Workspace, stage: Stage, found: checkpoint.Checkpoint | None) -> dict[str, str]:
    """{shape: "softmax" or "sdpa"} of a stage's attentions of few tokens; {} where nothing is chosen. Every rank must call it.

    found: the checkpoint that the stage goes on from; one that says nothing is of a version that knew SDPA alone.
    """
    if found:
        return dict(found.manifest.get("attention", {}))
    if work.device.type != "cpu" or stage.compile or not distributed.smallest(int(processor.timed())):
        return {}
    low = stage.products == "bf16" or (stage.trajectories and stage.trajectories.precision in ("auto", "bf16", "fp8"))
    dtypes = (torch.float32, torch.bfloat16) if low else (torch.float32,)
    shapes = [(t, d) for t, d in attentions(work.run, work.data.shape, work.data.classes) if t <= small.TOKENS]
    choices = {}
    for tokens, dim in shapes:
        for dtype in dtypes:
            mine = small.choose(tokens, dim, dtype) if distributed.rank() == 0 else small.SDPA
            ranks = distributed.every_rank([float(small.NAMES.index(mine))])
            choices[small.label(tokens, dim, dtype)] = small.NAMES[int(ranks[0][0])]
    return choices
