"""scikit-learn's handwritten digits (UCI optical recognition): 1,797 grey images of 8 x 8, ten classes."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from cmt_fast.config.schema import Digits
from cmt_fast.data.rows import Dataset


def load(config: Digits) -> Dataset:
    """x: (1797, 1, 8, 8) in [-1, 1], labels (1797,). Raises ValueError when scikit-learn is not installed."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.origin:
        raise ValueError("data.kind: 'digits' reads scikit-learn, which is not installed: pip install scikit-learn")
    table = _read(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz")
    x = torch.from_numpy(table[:, :-1]).float().div_(8.0).sub_(1.0).reshape(-1, 1, 8, 8)
    return Dataset(x, torch.from_numpy(table[:, -1]).long(), 10)


def _read(path: Path) -> np.ndarray:
    """(1797, 65) float64: 64 pixels from 0 to 16 and a label, by numpy alone; scikit-learn takes seconds to import."""
    if path.is_file():
        with gzip.open(path) as file:
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps its file elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])
