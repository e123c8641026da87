"""The teacher's trajectories in bulk: the pool that mid-training draws its points from, and how rollouts are run."""

from cmt_fast.trajectories.pool import Pool, drawn, roller
from cmt_fast.trajectories.rolling import Rolling

__all__ = ["Pool", "Rolling", "drawn", "roller"]
