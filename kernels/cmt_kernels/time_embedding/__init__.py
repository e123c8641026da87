"""time_embedding: sinusoidal features of a time (Vaswani et al. 2017), always in fp32 or wider, times not scaled by 1000.

y = [cos(w t), sin(w t)],  y. = [-w sin(w t), w cos(w t)] t.,  w geometric from 1/4 to max_frequency
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def time_embedding(t: Tensor | Dual, dim: int, max_frequency: float = 32.0) -> Tensor | Dual:
    """t: (B,) in units of order one -> (B, dim), float32 (float64 for a float64 t); dim even, at least 4.

    The dim/2 angular frequencies are geometric from 1/4 to `max_frequency`: a tangent grows with the highest
    frequency, which is why it is small and the usual factor of 1000 is absent.
    """
    return backend("time_embedding", t)(t, dim, max_frequency)
