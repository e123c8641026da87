"""What a low precision resolves of f(x_t) - f(x_r), on a mixture whose denoiser is known, and how a batch is split by it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cmt_fast.config.schema import Ect, Gmm
from cmt_fast.data.gmm import Exact, load
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.rng import TIME, Random
from cmt_fast.objectives import Batch, StageContext
from cmt_fast.objectives.rounding import BINS, Part, Rounding, measure, split

PATH = ProbabilityPath("ve", 0.75)
MIXTURE = Gmm(n=512)
DENOISER = Exact(MIXTURE, PATH)


def rounded(dtype: torch.dtype):
    """The known denoiser as a network in `dtype` would give it: F of c_skip x + c_out F is rounded, the rest is not."""

    def net(x: Tensor, t: Tensor, *_: object) -> Tensor:
        s = PATH.sigma_data
        skip, out = s**2 / (t**2 + s**2), t * s / (t**2 + s**2).sqrt()
        skip, out = column(skip, x), column(out, x)
        return skip * x + out * ((DENOISER(x, t) - skip * x) / out).to(dtype).to(x.dtype)

    return net


def batch() -> Batch:
    """Of the mixture, in float64."""
    return Batch(load(MIXTURE).x[:256].double(), None, torch.arange(256), None)


def ratios(dtype: torch.dtype, doublings: int) -> Tensor:
    """(parts, BINS), of steps that are halved from part to part."""
    config = Ect(q=2.0, k=0.0, doublings=doublings, mean=-0.8, std=1.0)
    parts = measure(
        rounded(dtype), lambda x, t, *_: DENOISER(x, t), batch(), Random(0, 2, 0), config, StageContext(PATH)
    )
    for part in parts:
        np.testing.assert_allclose(part.span, np.array(part.t) / 2.0 ** (1 + parts.index(part)), rtol=1e-6)
    return torch.tensor([part.ratio for part in parts])


def test_rounding_grows_as_steps_shrink_and_is_of_the_precision():
    """Below the limit noise stays and the difference falls with t - r: half the step, twice the ratio; 3 bits more, an eighth.

    Above it both outputs are often rounded to one number, which is no noise that averages out: there the law ends.
    """
    bf16, fp16 = ratios(torch.bfloat16, 12), ratios(torch.float16, 12)
    grown, resolved = torch.log2(bf16[1:] / bf16[:-1]), bf16[1:] < 0.1
    resolved[:2] = False  # steps of t/4 and more are no small ones
    assert resolved.sum() > 2 * BINS and (grown[resolved].mean() - 1).abs() < 0.1
    assert grown[bf16[:-1] > 1].mean() < 0.7
    both = (bf16 < 0.1) & (bf16 > 0)
    assert (torch.log2(bf16[both] / fp16[both]).mean() - 3).abs() < 0.1
    rule = Rounding(0.1, [Part([1.0] * BINS, [0.1] * BINS, [1.0] * BINS, row.tolist()) for row in bf16])
    assert rule.beyond(0) == 0 and rule.beyond(12) == 1 and not rule.refused
    assert Rounding(0.1, rule.parts[-1:]).refused
    assert Rounding.of(rule.stored()) == rule


def found(beyond: int) -> Rounding:
    """Of a schedule in two parts: in the second the first `beyond` of the times, the smallest, are beyond the limit."""
    worst = [0.5 - 0.01 * i if i < beyond else 0.01 for i in range(BINS)]
    part = lambda ratio: Part([1.0] * BINS, [0.1] * BINS, [1.0] * BINS, ratio)
    return Rounding(0.1, [part([0.01] * BINS), part(worst)])


def test_every_row_beyond_the_limit_is_among_the_first():
    rows, rule = 64, found(3)
    wide = rule.wide(1, rows)
    assert rule.wide(0, rows) == 0 and 0 < wide < rows and wide % (rows // 4) == 0
    least = -math.inf
    for step in range(300):
        random, sample = Random(0, 2, step), torch.arange(rows)
        given = Batch(sample[:, None].double(), sample % 10, sample, None)
        ordered, n = rule.sorted(given, random, 0.7)
        assert n == wide and torch.equal(ordered.sample.sort().values, sample)
        assert torch.equal(ordered.x_0[:, 0].long(), ordered.sample) and torch.equal(
            ordered.labels, ordered.sample % 10
        )
        place = torch.special.ndtr(random.gauss(TIME, ordered.sample).double())
        beyond = place < 3 / BINS
        least = max(least, int(beyond.sum()))
        assert not beyond[wide:].any()
        assert rule.sorted(given, random, 0.3) == (given, 0)
    assert least > 3 / BINS * rows  # some step had more than the mean


def test_more_rows_than_there_is_room_for_come_once_in_millions_of_steps():
    for rows in (8, 16, 32, 64, 256):
        for beyond in range(1, BINS):
            p, wide = beyond / BINS, found(beyond).wide(1, rows)
            more = range(wide + 1, rows + 1)
            assert sum(math.comb(rows, k) * p**k * (1 - p) ** (rows - k) for k in more) < 3e-7


def test_a_split_network_computes_the_first_rows_as_a_whole_one_would():
    x, t = torch.randn(8, 3), torch.rand(8)
    narrow, whole = (lambda x, t, *_: x.bfloat16() * 3 * t[:, None]), (lambda x, t, *_: x * 3 * t[:, None])
    y = split(narrow, whole, 2)(x, t, None)
    assert torch.equal(y[:2], whole(x, t)[:2]) and torch.equal(y[2:], narrow(x, t)[2:].float())
    assert torch.equal(split(narrow, whole, 8)(x, t), whole(x, t)) and split(narrow, whole, 0) is narrow
