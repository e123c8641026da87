"""scikit-learn's handwritten digits (UCI optical recognition): 1,797 grey images of 8 x 8, ten classes."""

from __future__ import annotations

import torch

from cmt_fast.config.schema import Digits
from cmt_fast.data.rows import Dataset


def load(config: Digits) -> Dataset:
    """x: (1797, 1, 8, 8) in [-1, 1], labels (1797,). Raises ValueError when scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "data.kind: 'digits' reads scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div_(8.0).sub_(1.0)[:, None]
    return Dataset(x, torch.from_numpy(bunch.target).long(), 10)
