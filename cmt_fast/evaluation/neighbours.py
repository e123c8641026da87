"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019): how much of one set lies in the other's manifold.

A set's manifold is the union of balls around its points, each as wide as the way to its k-th neighbour in the set.

Distances are taken in square tiles, which ranks share out: the memory is that of a few tiles beside the two sets, whatever
their size, and every rank ends with the same numbers. Within a set a tile above the diagonal serves its rows and its columns, and
between the sets it serves both figures, so that half of the products are made that one row at a time would need. The
smallest k of each row are merged from tile to tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cmt_fast.runtime import distributed, progress

K = 3  # neighbours, as Kynkäänniemi et al. count
TILE = 2048  # rows and columns; on a GPU its distances are 16 MB


def precision_recall(
    real: Tensor, made: Tensor, k: int = K, block: int = TILE, device: torch.device | None = None,
    advance: Callable[[int], object] = lambda tiles: None,
) -> tuple[float, float]:  # fmt: skip
    """Precision: samples in the manifold of real features; recall: real ones in that of the samples. (N, F), (M, F).

    Both sets are whole on every rank, and every rank must call it; tiles are computed on `device` (default: where the sets
    are). advance is told of tiles, of `tiles(N, M, block)` in all. Raises ValueError for sets of k rows and fewer.
    """
    for x in (real, made):
        if len(x) <= k:
            raise ValueError(
                f"precision and recall look at the {k}-th neighbour, and a set has {len(x)} rows; {k + 1} are needed"
            )
    centre = real.mean(0)  # near the origin squared distances by dot products keep their digits
    with _exactly():
        sets = [_Tiles(x, centre, block, device or real.device) for x in (real, made)]
        wide = [radii(x, k, advance) for x in sets]
        return _covered(*sets, *wide, advance)


def shown(real: Tensor, made: Tensor, device: torch.device) -> tuple[float, float]:
    """`precision_recall`, named where a display is open; each tile is a sign of life."""
    with progress.phase("precision and recall", quiet=True) as advance:
        return precision_recall(real, made, device=device, advance=advance)


def tiles(n: int, m: int, block: int = TILE) -> int:
    """How many of them two sets of n and m rows take."""
    a, b = -(-n // block), -(-m // block)
    return a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


class _Tiles:
    """A set (N, F) about a centre (F,), a tile of its rows at a time on a device."""

    def __init__(self, x: Tensor, centre: Tensor, block: int, device: torch.device) -> None:
        self.x, self.centre, self.block, self.device = x, centre.to(x.device), block, device
        self.places = [slice(i, min(i + block, len(x))) for i in range(0, len(x), block)]

    def rows(self, place: slice) -> tuple[Tensor, Tensor]:
        """(m, F) and the squares of their lengths (m,)."""
        rows = (self.x[place] - self.centre).to(self.device)
        return rows, rows.square().sum(1)


def radii(x: _Tiles, k: int, advance: Callable[[int], object]) -> Tensor:
    """Squared distance of every point to its k-th neighbour in the set, itself not counted. (N,) on the device, on every rank."""
    n = len(x.x)
    nearest = torch.full((n, k), float("inf"), dtype=x.x.dtype, device=x.device)

    def merge(place: slice, d: Tensor) -> None:
        """d: (m, any) distances of the rows at `place` to others."""
        both = torch.cat((nearest[place], d.topk(min(k, d.shape[1]), dim=1, largest=False).values), 1)
        nearest[place] = both.topk(k, dim=1, largest=False).values

    for a, b in _mine([(a, b) for i, a in enumerate(x.places) for b in x.places[i:]], advance):
        d = _squared(x.rows(a), x.rows(b))
        if a == b:
            d.fill_diagonal_(float("inf"))
        else:
            merge(b, d.T.contiguous())
        merge(a, d)
    every = distributed.gather_uneven(nearest.cpu()).view(-1, n, k).transpose(0, 1).reshape(n, -1)
    return every.topk(k, dim=1, largest=False).values.amax(1).clamp_(min=0).to(x.device)


def _covered(
    real: _Tiles, made: _Tiles, wide: Tensor, wide_made: Tensor, advance: Callable[[int], object]
) -> tuple[float, float]:
    """The share of samples in a ball about a real point, and of real points in one about a sample."""
    inside, inside_made = (torch.zeros(len(s.x), dtype=torch.bool, device=s.device) for s in (real, made))
    for a, b in _mine([(a, b) for a in made.places for b in real.places], advance):
        if bool(inside_made[a].all()) and bool(inside[b].all()):
            continue  # all of them are known to be
        d = _squared(made.rows(a), real.rows(b))
        inside_made[a] |= (d <= wide[b]).any(1)
        inside[b] |= (d <= wide_made[a][:, None]).any(0)
    counts = [int((distributed.sum_(found.int()) > 0).sum()) for found in (inside_made, inside)]
    return counts[0] / len(inside_made), counts[1] / len(inside)


def _mine(pairs: list[tuple[slice, slice]], advance: Callable[[int], object]) -> Iterator[tuple[slice, slice]]:
    """This rank's share of the tiles, one in so many as there are ranks."""
    for i, pair in enumerate(pairs):
        if i % distributed.size() == distributed.rank():
            yield pair
        advance(1)


def _squared(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Squared distances (N, M) of rows (N, F) and (M, F), given with their squares; of equal rows a rounding, of any sign."""
    return (a[1][:, None] + b[1]).sub_(a[0] @ b[0].T, alpha=2)


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Inside, a GPU does not round the factors of products: of nearby points nothing would be left."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
