"""consistency_loss: distance of a prediction to a target, one value a row.

l = sum (prediction - target)^2
"squared_l2": l        "l2": sqrt(l + 1e-16), smooth at zero: no NaN gradient
"pseudo_huber": sqrt(l + c^2) - c   (Song & Dhariwal 2023; Geng et al. 2024, ECT)
"""

from torch import Tensor

from cmt_kernels._op import backend


def consistency_loss(prediction: Tensor, target: Tensor, distance: str = "pseudo_huber", c: float = 0.01) -> Tensor:
    """prediction, target: (B, ...) -> (B,), with gradient to the prediction only; the target is detached.

    Raises ValueError for an unknown distance.
    """
    return backend("consistency_loss", prediction)(prediction, target, distance, c)
