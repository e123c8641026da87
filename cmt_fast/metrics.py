"""Judging samples: Fréchet distance in a named feature space, class accuracy, sliced Wasserstein distance.

The distance is never called FID: that name belongs to one Inception network. Which features were used,
and their hash, stands beside every figure.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmt_fast.data import Rows, in_memory


class Extractor(Protocol):
    """A feature space: its name with a hash, features (N, F) of images (N, ...), and class predictions if it has them."""

    name: str

    def features(self, x: Tensor) -> Tensor: ...

    def classes(self, x: Tensor) -> Tensor | None: ...


class Identity:
    """The data themselves as features, for vectors."""

    name = "identity"

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def classes(self, x: Tensor) -> None:
        return None


class Classifier(nn.Module):
    """A 64-32 MLP trained on the real images from a fixed seed; its last hidden layer is the feature space.

    Small on purpose: seconds on a CPU, the same weights every time on one machine, stored with its hash.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU())
        self.head = nn.Linear(32, classes)
        self.name = "classifier-64-32"

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, 32)."""
        return self.body(x.flatten(1))

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,) the likeliest class."""
        return self.head(self.body(x.flatten(1))).argmax(1)

    def differentiable(self, x: Tensor) -> Tensor:
        """Features with gradient, for the distance "features". (N, ...) -> (N, 32)."""
        return self.body(x.flatten(1))


def train_classifier(data: Rows, seed: int = 0, epochs: int = 40, batch: int = 128) -> Classifier:
    """AdamW 3e-3 with linear decay on all rows, cross-entropy, from `seed`; leaves the global generator as it was."""
    data = in_memory(data)
    assert data.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.x[0].numel(), data.classes)
        steps = epochs * -(-len(data.x) // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(data.x)).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(net.head(net.body(data.x[rows].flatten(1))), data.labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def extractor(data: Rows, cache: Path) -> Extractor:
    """The run's feature space: the classifier for labelled images (kept in `cache`), else the data themselves."""
    if data.labels is None or len(data.shape) == 1:
        return Identity()
    file = cache / "extractor.safetensors"
    net = Classifier(math.prod(data.shape), data.classes)
    if file.is_file():
        net.load_state_dict(load_file(file))
        net.eval().requires_grad_(False)
    else:
        net = train_classifier(data)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file(net.state_dict(), temporary)
        temporary.replace(file)
    digest = xxhash.xxh3_128()
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    net.name = f"classifier-64-32@{digest.hexdigest()[:12]}"
    return net


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """features: (N, F), N >= 2."""
    f = features.double()
    return Moments(f.mean(0), torch.cov(f.T).reshape(f.shape[1], f.shape[1]))


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), float64, by symmetric eigenvalues.

    tr (C_a C_b)^1/2 is the sum of square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128, seed: int = 0) -> float:
    """2-Wasserstein distance averaged over random directions (Bonneel et al. 2015). a: (N, ...), b: (M, ...).

    Both sets are compared at the quantiles of the smaller one.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    g = torch.Generator().manual_seed(seed)
    d = F.normalize(torch.randn(a.shape[1], directions, generator=g, dtype=torch.float64), dim=0)
    n = min(len(a), len(b))
    q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    pa, pb = (torch.quantile(x @ d, q, dim=0) for x in (a, b))
    return float((pa - pb).square().mean().sqrt())


class Judge:
    """Compares samples with the real data; holds what of the real data is reused."""

    def __init__(self, data: Rows, features: Extractor) -> None:
        self.real, self.space = in_memory(data).x.cpu(), features
        self.reference = moments(features.features(self.real))

    def __call__(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        """samples: (n, ...), labels (n,) they were asked for -> frechet, sliced_wasserstein, and accuracy with labels."""
        out = {
            "frechet": frechet(moments(self.space.features(samples)), self.reference),
            "sliced_wasserstein": sliced_wasserstein(samples, self.real),
        }
        predicted = self.space.classes(samples)
        if predicted is not None and labels is not None:
            out["accuracy"] = float((predicted == labels).double().mean())
        return out
