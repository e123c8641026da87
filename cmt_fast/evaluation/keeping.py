"""What a run keeps of real data for judging (kept.py), taken from the judge that has the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmt_fast.diffusion.labels import Law
from cmt_fast.evaluation import distances, kept, sharpness
from cmt_fast.evaluation.judges import Judge
from cmt_fast.evaluation.kept import Kept
from cmt_fast.evaluation.second import Second

SHARP = 2000  # rows that say how sharp real ones are, at most
FEATURES_BYTES = 32 << 20  # of them, at most
LARGEST_BYTES = 50 << 20  # of projections; of more the quantiles are kept


def take(judge: Judge, key: dict[str, Any]) -> Kept:
    """From the data of a judge. Raises ConfigError where they, or its reference, cannot be had."""
    real, weights, known = judge.real, judge.weights, judge.reference
    index = chosen(judge.labels, judge.law if weights is not None else None, len(real), kept.ROWS)
    second, features = Second(tuple(judge.data.shape)).fit(real)
    mu_2, sigma_2 = distances.moments(features, weights)
    tensors = {
        "mu": known.moments.mean.cpu(),
        "sigma": known.moments.covariance.cpu(),
        "mu_2": mu_2,
        "sigma_2": sigma_2,
    }
    tensors |= {f"fitted.{k}": v for k, v in second.fitted.items()}
    tensors["features_2"] = features[_few(index, features.shape[1])].clone()
    if known.features is not None:
        own = index if judge.file is None else torch.arange(len(known.features))
        tensors["features"] = known.features[_few(own, known.features.shape[1])].float().cpu()
    if weights is not None:
        tensors["weights"] = weights
    if judge.file is None:
        tensors["projected"] = judge.projected
        if judge.projected.nbytes > LARGEST_BYTES:
            q = (torch.arange(kept.ROWS, dtype=torch.float64) + 0.5) / kept.ROWS
            tensors["projected"] = distances.quantiles(judge.projected, weights, q)
            tensors.pop("weights", None)
    if sharpness.served(judge.data.shape):
        each = [sharpness.energies(part) for part in real[index[:: -(-len(index) // SHARP)]].split(256)]
        tensors["high_energy"] = torch.stack(each).sum(0)
    tensors["shown"] = real[_shown(judge.labels, judge.law, len(real), len(judge.data.shape) == 3)].clone()
    about = {
        "format": kept.FORMAT, "key": key, "n": known.n, "source": known.source, "labels": known.labels, "rows": len(real),
        "shape": list(judge.data.shape), "second": second.name, "floor": {},
    }  # fmt: skip
    return Kept(about, tensors)


def _few(index: Tensor, width: int) -> Tensor:
    """As many of these rows, evenly spaced, as stay within FEATURES_BYTES."""
    n = max(1, min(len(index), FEATURES_BYTES // (4 * width)))
    return index[torch.arange(n) * len(index) // n]


def chosen(labels: Tensor | None, law: Law | None, rows: int, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced; with a law as many of every class as makes the classes' shares its own."""
    if law is None or labels is None:
        n = min(rows, most)
        return torch.arange(n) * rows // n
    have = torch.bincount(labels, minlength=len(law.counts)).double()
    present = [k for k in law.present.tolist() if have[k]]
    total = min(float((have[present] / law.shares[present]).min()), float(most))
    parts = []
    for k in present:
        own, n = (labels == k).nonzero()[:, 0], max(1, int(total * float(law.shares[k])))
        parts.append(own[torch.arange(n) * len(own) // n])
    return torch.cat(parts).sort().values


def _shown(labels: Tensor | None, law: Law | None, rows: int, images: bool) -> Tensor:
    """Rows for the picture: one of each class in order, as pictures of samples have them; without classes evenly spaced."""
    n = min(rows, kept.SHOWN if images else kept.POINTS)
    if labels is None or law is None or not images or not len(law.counts):
        return torch.arange(n) * rows // n
    asked = Law.uniform(law.present, len(law.counts))(torch.arange(kept.SHOWN))
    assert asked is not None
    out, met = [], dict.fromkeys(asked.tolist(), 0)
    for k in asked.tolist():
        own = (labels == k).nonzero()[:, 0]
        if len(own):
            out.append(int(own[met[k] % len(own)]))
        met[k] += 1
    return torch.tensor(out)
