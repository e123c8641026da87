"""Guided networks: classifier-free guidance and autoguidance of a callable `net`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# net(x (B, ...), t (B,), r (B,), labels (B,) | None) -> (B, ...): D(x, t) on VE, u(x, r, t) on linear flow
Net = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Guided(NamedTuple):
    """Classifier-free guidance: F = F_null + scale (F_cond - F_null) (Ho & Salimans 2022), both in one batch.

    `network` also takes `drop` (B,) bool. Raises ValueError for data without labels.
    """

    network: Callable
    scale: float

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        conditional, null = self._both(self.network, x, t, r, labels).chunk(2)
        return torch.lerp(null, conditional, self.scale)

    def raw(self, x_in: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """The network's raw outputs with labels and without: (B, ...) -> (2B, ...)."""
        return self._both(getattr(self.network, "raw", self.network), x_in, t, r, labels)

    @property
    def scalings(self) -> Callable | None:
        """The network's preconditioning, None where it is its own prediction."""
        return getattr(self.network, "scalings", None)

    @staticmethod
    def _both(call: Callable, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("guidance needs class labels, and this data has none")
        drop = torch.cat((torch.zeros_like(labels), torch.ones_like(labels))).bool()
        return call(*(torch.cat((a, a)) for a in (x, t, r, labels)), drop)


class Autoguided(NamedTuple):
    """Autoguidance (Karras et al. 2024): D = D_guide + scale (D_network - D_guide), `guide` a weaker network of any size."""

    network: Net
    guide: Net
    scale: float

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        return torch.lerp(self.guide(x, t, r, labels), self.network(x, t, r, labels), self.scale)

    def raw(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        """Both predictions, (B, ...) -> (2B, ...): the two may be preconditioned differently, so neither is raw."""
        return torch.cat((self.network(x, t, r, labels), self.guide(x, t, r, labels)))


class Told(NamedTuple):
    """A network that is told its guidance (improved MeanFlow): scale omega and the interval of times that it holds in.

    Each a number for all rows, or one a row (B,).
    """

    network: Callable
    omega: float | Tensor
    low: float | Tensor
    high: float | Tensor

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None) -> Tensor:
        said = (self.omega, self.low, self.high)
        rows = [value.to(t) if isinstance(value, Tensor) else torch.full_like(t, value) for value in said]
        return self.network(x, t, r, labels, None, None, False, torch.stack(rows, dim=1))


def guided(net, scale: float) -> Net:
    """The network under classifier-free guidance; itself at scale 1."""
    return net if scale == 1.0 else Guided(net, scale)
