"""fourier_embedding: waves of given frequencies of a time, always in fp32 or wider.

y = sqrt(2) cos(w t + phase) (EDM2's magnitude-preserving features), or without phases y = [cos(w t), sin(w t)] (EDM, DiT);
y. = -sqrt(2) w sin(w t + phase) t.  or  [-w sin(w t), w cos(w t)] t.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def fourier_embedding(t: Tensor | Dual, frequency: Tensor, phase: Tensor | None = None) -> Tensor | Dual:
    """t: (B,); frequency, phase: (n,) -> (B, n) with phases, (B, 2 n) without, float32 (float64 for a float64 t)."""
    return backend("fourier_embedding", t)(t, frequency, phase)
