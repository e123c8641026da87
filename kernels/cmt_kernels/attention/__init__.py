"""attention: softmax(Q K^T / sqrt(d)) V over packed qkv, no mask, no dropout.

S = c Q K^T,  S. = c (Q. K^T + Q K.^T),  P = softmax S,  mu_i = sum_j P_ij S._ij
O = P V,      O. = (P S.) V + P V. - diag(mu) O

On a CUDA device a plain call under `no_grad` goes to the fastest library by measurement (primal.py), whose value is not
bitwise a Dual's. In grad mode, and everywhere under `CMT_ATTENTION=triton`, it is. On a GPU a kernel of ours computes
only what it has proven there (proof.py); what it has not is plain torch, and a line says so.

Finite where the formula in float64 is, as long as the logits and dO V^T fit float32.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def attention(qkv: Tensor | Dual) -> Tensor | Dual:
    """qkv: (B, T, 3, H, d) packed -> (B, T, H d), dtype of qkv; the scale c is 1/sqrt(d)."""
    return backend("attention", qkv)(qkv)
