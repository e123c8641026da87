"""Randomness as a function of (seed, stage, step, sample, stream): restarts and world size change nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cmt_kernels import philox
from torch import Tensor

# What a number is drawn for. A stream is never used for two things.
NOISE, TIME, TIME_R, DROP, START, START_LABEL, PAIR, SHUFFLE, SAMPLE, RENOISE, PROJECTION, DATA = range(12)
LATENT, DROPOUT, START_DROP, SHARDS, EXPORT, HELD_OUT = 12, 13, 14, 40, 41, 42
REDRAWN = 16  # added to the index of a stage for every other draw of its noise: more than there are stages
SETS = 60
AUGMENT, AUGMENT_GAUSS, AUGMENT_NOISE = range(20, 23)
MIDDLE, LENGTH = 30, 31
GUIDANCE, GUIDANCE_LOW, GUIDANCE_HIGH = 34, 35, 36
START_GUIDANCE, START_GUIDANCE_LOW, START_GUIDANCE_HIGH = 37, 38, 39  # of a trajectory
TOLD, TOLD_GAUSS = 24, 25  # of an augmentation that the network is told of


class Random(NamedTuple):
    """The random numbers of one step of one stage; `stage` is an index, `step` counts optimizer steps."""

    seed: int
    stage: int
    step: int

    def key(self, stream: int) -> philox.Key:
        return philox.Key(self.seed, self.stage, self.step, stream)

    def uniform(self, stream: int, sample: Tensor) -> Tensor:
        """One number in (0, 1) a row. sample: (B,) -> (B,) float64."""
        return philox.uniform(self.key(stream), sample, 1)[:, 0]

    def gauss(self, stream: int, sample: Tensor) -> Tensor:
        """One standard normal number a row. sample: (B,) -> (B,) float32."""
        return philox.normal(self.key(stream), sample, (1,))[:, 0]

    def normal(self, stream: int, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal. sample: (B,) -> (B, *shape) float32."""
        return philox.normal(self.key(stream), sample, shape)

    def integers(self, stream: int, sample: Tensor, n: int) -> Tensor:
        """Uniform integers in [0, n). sample: (B,) -> (B,) int64."""
        return (self.uniform(stream, sample) * n).to(torch.int64).clamp_(max=n - 1)

    def seeds(self, stream: int, sample: Tensor, n: int) -> Tensor:
        """n pairs of 32-bit integers a row. sample: (B,) -> (B, n, 2) int64."""
        return philox.integers(self.key(stream), sample, -(-n // 2)).view(len(sample), -1, 2)[:, :n]

    def permutation(self, stream: int, n: int, device: torch.device | str = "cpu") -> Tensor:
        """A uniform permutation of 0..n-1. (n,) int64."""
        return torch.argsort(self.uniform(stream, torch.arange(n, device=device)), stable=True)
