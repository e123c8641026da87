"""Drifting (Deng et al. 2026, arXiv 2602.04770): a one-step generator whose samples move, as a set, toward the data's.

The last stage of a generator of one step, on either path: x = f(eps), which is D(t_max eps, t_max) on "ve" and eps - u(eps, 0, 1)
on "linear". Each of the M samples of a set is drawn to real rows and pushed away by the other samples, more by nearer ones, and
regressed on where that leads. Where both have one distribution nothing moves in the mean. No teacher, no second network, no pair
of noise and image: what a distillation cannot tell, which of many images belongs to a noise, it leaves open. An anchor of
mid-training beside it keeps that map.

The kernel needs a space in which near means alike. Spaces are the rows themselves and the feature maps of a perceptual network
(`perceptual.weights`): of each map the mean and the deviation of each channel over the image, and over each of 4 x 4 fields.
The run's own classifier, the space of its first distance, is none of them: a generator trained in it would win there without
being better. Where the judge looks at the rows themselves (vectors, images without labels) believe the second distance.
Each kind of feature is measured in units of its mean distance, each temperature's force in units of its own root mean square.
So the loss itself says little, about the number of temperatures squared at any quality: `drift` in the metrics is the force as
it is.

A set is of one class (`by_class`), whose rows the loader puts together, or of all. Its units are its own, where the published
code takes one for all classes of a batch: so sets are the same over any number of processes and passes.

Left out of the published recipe: the queues of real rows of earlier steps (a set's real rows are its own), unconditional rows as
negatives with a guidance scale that the network is told, single places of feature maps as vectors, and the random style tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Drift
from cmt_fast.diffusion import rng
from cmt_fast.objectives import rules, sets
from cmt_fast.objectives.batch import Batch, LossContext, StageContext, composed

FIELDS = (1, 4)  # along a side, over which the means and deviations of a feature map are taken
FAR = 100.0  # added to a sample's distance to itself, in units of the mean distance
LEAST_SQUARE, LEAST_SCALE, LEAST_WEIGHT, LEAST_FORCE = 1e-8, 1e-3, 1e-6, 1e-8  # as published


class Drawn(NamedTuple):
    """Noise z = sigma(t) eps and real rows x_0: (B, ...) each; t: (B,) where sampling begins; labels, drop: as of Batch."""

    z: Tensor
    x_0: Tensor
    t: Tensor
    labels: Tensor | None
    drop: Tensor | None


def check(config: Drift, setting: rules.Setting) -> None:
    """Sets fill a batch, are of one class where they are to be, and begin where sampling does. Raises ConfigError."""
    rules.whole_sets(config, setting)
    noise, key = begins(config, setting.path), f"{setting.key}.t_max"
    if setting.path == "linear" and config.t_max not in (None, 1.0):
        raise ConfigError(f"{key}: {config.t_max:g} on the path 'linear', where noise is at 1; leave the key out")
    if noise != setting.t_max:
        raise ConfigError(
            f"{key}: the generator takes its noise at {noise:g}, and samples begin at sampler.t_max {setting.t_max:g}; "
            "both must be one"
        )
    if not (setting.classes and config.by_class):
        return
    if setting.label_dropout:
        raise ConfigError(
            f"{setting.stage}.label_dropout: {setting.label_dropout} with objective.by_class: a set of one class has no rows for "
            "samples without a label; take label_dropout 0, or by_class false"
        )
    if setting.loader != "torch":
        raise ConfigError(
            f"loader.kind: {setting.loader!r} puts no rows of a class together, which {setting.key}.by_class asks for; take "
            "torch, or by_class false"
        )


def begins(config: Drift, path: str) -> float:
    """The time at which the generator takes its noise: 1 on "linear", `t_max` on "ve"."""
    return 1.0 if path == "linear" else 80.0 if config.t_max is None else config.t_max


def draw(batch: Batch, config: Drift, context: LossContext) -> Drawn:
    """Noise of the prior for each row; the batch's own rows are the real ones."""
    sets.count(len(batch.sample), config.group)
    t = torch.full(batch.sample.shape, begins(config, context.path.name), device=batch.x_0.device).to(batch.x_0.dtype)
    z, _ = context.path.point(torch.zeros_like(batch.x_0), t, context.random.key(rng.NOISE), batch.sample)
    return Drawn(z, batch.x_0, t, batch.labels, batch.drop)


def loss(net, drawn: Drawn, config: Drift, stage: StageContext) -> tuple[Tensor, dict[str, Tensor]]:
    """L = sum_phi 1/D || phi(x) - sg[ phi(x) + sum_tau V_tau / rms(V_tau) ] ||^2,    x = f(eps)
    V_tau(x) = sum_jk a(x, y_j) a(x, x_k) (y_j - x_k),    a ~ exp( -||phi - phi'|| / tau ), normalised over rows and columns

    y_j the real rows of the set, x_k its other samples; phi in units in which the mean distance is sqrt(D). Returns (B,).
    """
    z, x_0, t, labels, drop = drawn
    if stage.path.name == "linear":
        x = z - net(z, t, torch.zeros_like(t), labels, drop)
    else:
        x = net(z, t, None, labels, drop)
    with torch.no_grad():
        real = features(x_0, config, stage)
    total, forces = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)), []
    for a, b in zip(features(x, config, stage), real, strict=True):
        row, force = drifted(a.to(total.dtype), b.to(total.dtype), config)
        total, forces = total + row, [*forces, force]
    return total, {"drift": torch.stack(forces).mean()}


def features(x: Tensor, config: Drift, stage: StageContext) -> list[Tensor]:
    """What a space says of rows (B, ...): for each kind of feature (B, places, D). Raises ValueError without its network."""
    if config.space == "data":
        return [x.flatten(1)[:, None]]
    if stage.perceptual is None:
        raise ValueError(f"objective.space: {config.space!r} needs a network, perceptual.weights names it")
    out = []
    for f in stage.perceptual.net.slices(x.float()):
        for side in FIELDS:
            if min(f.shape[2:]) < 2 * side:  # a field of one number has no deviation
                continue
            mean = F.adaptive_avg_pool2d(f, side)
            square = F.adaptive_avg_pool2d(f.square(), side)
            deviation = (square - mean.square()).clamp(min=0).add(1e-6).sqrt()
            out += [y.flatten(2).transpose(1, 2) for y in (mean, deviation)]
    return out


def drifted(x: Tensor, y: Tensor, config: Drift) -> tuple[Tensor, Tensor]:
    """The part of the loss of one kind of feature, and the root mean square of its force, over temperatures and all.

    x: of samples, y: of real rows, (B, places, D) each. Returns (B,), ().
    """
    by_set = lambda f: sets.gathered(f, config.group).transpose(1, 2)  # (S, places, M, D)
    with torch.no_grad():
        forces, sizes, scale = _forces(by_set(x.detach()), by_set(y), config.temperatures)
        goal = by_set(x.detach()) / scale + forces
    squared = (by_set(x) / scale - goal).square().mean((1, 3))
    return sets.scattered(squared), sizes.mean().sqrt()


def _forces(x: Tensor, y: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over temperatures of V / rms(V), the mean squares of each V, and the unit that a set is measured in.

    x, y: (S, places, M, D). Returns (S, places, M, D), (temperatures, S, 1, 1, 1), (S, 1, 1, 1).
    """
    m, d = x.shape[2:]
    of_set = lambda f: f.mean((1, 2, 3), keepdim=True)
    both = torch.cat((x, y), dim=2)
    both = both - both.mean(2, keepdim=True)  # differences alone matter, and sums of large numbers round them off
    dist = _distances(both[:, :, :m], both)
    mean = of_set(dist)
    scale = (mean / d**0.5).clamp(min=LEAST_SCALE)
    itself = torch.eye(m, 2 * m, dtype=x.dtype, device=x.device)
    dist = dist / mean.clamp(min=LEAST_SCALE) + FAR * itself
    total, sizes = torch.zeros_like(x), []
    for tau in temperatures:
        a = (torch.softmax(-dist / tau, 3) * torch.softmax(-dist / tau, 2)).clamp(min=LEAST_WEIGHT).sqrt()
        samples, rows = a[..., :m], a[..., m:]
        pull = rows * samples.sum(3, keepdim=True)
        push = samples * rows.sum(3, keepdim=True)
        force = torch.cat((-push, pull), 3) @ (both / scale)
        size = of_set(force.square())
        sizes.append(size)
        total = total + force / size.clamp(min=LEAST_FORCE).sqrt()
    return total, torch.stack(sizes), scale


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_j - y_k|| by products, in the rows' own precision. (..., M, D), (..., N, D) -> (..., M, N)."""
    squared = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.transpose(-1, -2)
    return squared.clamp(min=LEAST_SQUARE).sqrt()


drift = composed(draw, loss)
