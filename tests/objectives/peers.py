"""The little network on which other projects' own losses were recorded, and where those records are.

F(x, t, r) = C tanh(A x + a t + b r + d), x (B, 2), hidden 5, in float64; its numbers are sines, so that it can be written down
again anywhere: the k-th number of all, in the order A (5, 2), a (5,), b (5,), d (5,), C (2, 5), is sin(3 k + 1) / 2.
Where it has labels, is told guidance or has a second head, more numbers follow in that order: `label` (4, 5), a row for each of
three classes and the last for none, and `guide` (3, 5) of scale and interval are added before the tanh; `H` (2, 5) is in the
place of C for the head.
A file tests/fixtures/peers/NAME.json holds
    peer: owner/repository@commit, file and function; kind, path, config: of the objective; drawn: its `Drawn` by field, numbers
    as nested lists, absent ones null; teacher: whether its network has a teacher, which is the same with every number
    halved; network: "labelled" where it has labels; loss (B,) and grad: of the mean loss, in the order above, as that
    project's own code gave them; scale: what that loss is times ours (1 where it is the same); each: "set" where the loss is of
    sets of `config.group` rows, (sets,).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import Dual
from cmt_kernels.dual import value
from torch import Tensor, nn

RECORDS = Path(__file__).parents[1] / "fixtures" / "peers"
SHAPES = {"A": (5, 2), "a": (5,), "b": (5,), "d": (5,), "C": (2, 5)}
LABELLED = {**SHAPES, "label": (4, 5), "guide": (3, 5), "H": (2, 5)}


class Small(nn.Module):
    """The network, for Tensor | Dual; on "ve" it is D = c_skip x + c_out F(c_in x, ln(t)/4, 0), on "linear" u = F(x, t, r)."""

    shapes = SHAPES

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        k = 0
        for name, shape in self.shapes.items():
            n = torch.Size(shape).numel()
            numbers = scale * torch.sin(3.0 * torch.arange(k, k + n, dtype=torch.float64) + 1) / 2
            setattr(self, name, nn.Parameter(numbers.view(shape)))
            k += n

    def plain(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """F. x: (B, 2), t, r: (B,) -> (B, 2)."""
        hidden = torch.tanh(x @ self.A.T + t[:, None] * self.a + r[:, None] * self.b + self.d)
        return hidden @ self.C.T


class Linear(Small):
    """u(z, r, t) = F(z, t, r), the time r = t where none is given."""

    def forward(self, x: Any, t: Any, r: Any = None, labels: Any = None, drop: Any = None) -> Any:
        return called(self.plain, x, t, t if r is None else r)


class Labelled(Small):
    """u(z, r, t) of a class, told guidance or not, and its auxiliary head's velocity, where that is asked for."""

    shapes = LABELLED

    def forward(
        self,
        x: Any,
        t: Any,
        r: Any = None,
        labels: Any = None,
        drop: Any = None,
        seeds: Any = None,
        head: bool = False,
        guide: Tensor | None = None,
    ) -> Any:
        more = self.label[labels if drop is None else torch.where(drop, 3, labels)]
        more = more if guide is None else more + guide @ self.guide

        def out(end: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            hidden = x @ self.A.T + t[:, None] * self.a + r[:, None] * self.b + self.d
            return torch.tanh(hidden + more[: len(x)]) @ end.T

        u = called(partial(out, self.C), x, t, t if r is None else r)
        return (u, out(self.H, *(value(a) for a in (x, t, r)))) if head else u


class Ve(Small):
    """D(x, t) by EDM's preconditioning with sigma_data 0.5; beside it, where asked, the log variance a_0 ln(t)/4 + d_0."""

    def denoised(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        total = (t.square() + 0.25)[:, None]
        f = self.plain(x * total.rsqrt(), t.log() / 4, torch.zeros_like(t))
        return 0.25 / total * x + 0.5 * t[:, None] * total.rsqrt() * f

    def forward(
        self,
        x: Any,
        t: Any,
        r: Any = None,
        labels: Any = None,
        drop: Any = None,
        seeds: Any = None,
        uncertainty: bool = False,
    ) -> Any:
        out = called(self.denoised, x, t, t)
        return (out, self.a[0] * value(t).log() / 4 + self.d[0]) if uncertainty else out


def called(f: Any, *given: Any) -> Any:
    """f of values, with the tangent of the first k rows by torch.func.jvp where some are Duals."""
    out = f(*(value(a) for a in given))
    k = next((len(a.tangent) for a in given if isinstance(a, Dual)), 0)
    if not k:
        return out
    heads = tuple(value(a)[:k].detach() for a in given)
    dots = tuple(a.tangent if isinstance(a, Dual) else torch.zeros_like(h) for a, h in zip(given, heads))
    return Dual(out, torch.func.jvp(f, heads, dots)[1].detach())


def network(which: str, scale: float = 1.0) -> Small:
    """The network of a path, or the one with labels; a teacher's numbers are halved."""
    return {"ve": Ve, "linear": Linear, "labelled": Labelled}[which](scale)


def records() -> list[dict[str, Any]]:
    """What was recorded, by file name."""
    return [{"name": file.stem, **json.loads(file.read_text("utf-8"))} for file in sorted(RECORDS.glob("*.json"))]
