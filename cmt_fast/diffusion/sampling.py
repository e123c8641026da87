"""Samples of a network: labels, starting noise and sampler as a function of (seed, index), so sets compare one to one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import SamplerConfig
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.few_steps import consistency_first, consistency_onwards, sample_jumps
from cmt_fast.diffusion.guidance import Told, guided
from cmt_fast.diffusion.labels import Law
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import Table, rollout, table


class Sampler:
    """How a run's networks are sampled: path, sampler, shape of a row, the law of labels, device."""

    def __init__(
        self, path: ProbabilityPath, config: SamplerConfig, shape: tuple[int, ...], law: Law, device: torch.device
    ) -> None:
        self.path, self.config, self.shape, self.law, self.device = path, config, shape, law, device
        self.scales: tuple[float, ...] = ()  # of guidance that samples are told in turn, where there are several

    def under(self, law: Law) -> Sampler:
        """The same with labels of another law."""
        other = copy.copy(self)
        other.law = law
        return other

    def guided_by(self, scale: float) -> Sampler:
        """The same whose solver is guided by `scale`."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, guidance=scale)
        return other

    def told(self, *omega: float) -> Sampler:
        """The same whose few steps tell the network this guidance scale, in the recipe's interval; several of them in turn."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, told_guidance=(omega[0], *self.config.told_guidance[1:]))
        other.scales = omega if len(omega) > 1 else ()
        return other

    def omega(self, index: Tensor) -> Tensor:
        """The guidance scale that each sample is told. index: (n,) -> (n,) float64.

        Several go round so that every class has each equally often: sample `index`, the m-th of class k, has number k + m.
        """
        all_ = torch.tensor(self.scales or self.config.told_guidance[:1], dtype=torch.float64, device=index.device)
        classes = max(1, len(self.law.present))
        return all_[(index % classes + index // classes) % len(all_)]

    def _telling(self, net: Callable, index: Tensor) -> Callable:
        """The network, told what the recipe or the user says; as it is where that is nothing."""
        omega, low, high = self.config.told_guidance
        if not self.scales:
            return net if omega == 1 else Told(net, omega, low, high)
        return Told(net, *self.guide(index).unbind(1))

    def guide(self, index: Tensor) -> Tensor:
        """Scale and interval that each sample is told. index: (n,) -> (n, 3) float64; of scale 1 all times, as told nothing."""
        rows, (_, *ends) = self.omega(index), self.config.told_guidance
        low, high = (torch.where(rows == 1, at, end) for at, end in zip((0.0, 1.0), ends))
        return torch.stack((rows, low.to(rows), high.to(rows)), dim=1)

    def starting(self, noise: Tensor, labels: Tensor | None, like: Tensor) -> Sampler:
        """The same whose samples 0, 1, ... start from these rows of noise (n, ...), of these labels (n,).

        like (n,): whose index each takes for the noise between steps.
        """
        return _Starting(self, noise, labels, like)

    def each_class(self) -> Sampler:
        """The same with one sample of every class that is drawn at all, in order, over and over: for pictures."""
        return self.under(Law.uniform(self.law.present, len(self.law.counts)))

    def mid_times(self, steps: int) -> tuple[float, ...]:
        """The times after the first of a consistency model's `steps`. Raises ValueError if the recipe names none."""
        if steps == 1:
            return ()
        times = self.config.mid_times.get(steps)
        if times is None or len(times) != steps - 1:
            known = ", ".join(str(k) for k in sorted({1, *self.config.mid_times}))
            raise ConfigError(f"has no {steps - 1} times for {steps} steps; it serves {known}", "sampler.mid_times")
        return times

    def check_steps(self, steps: Sequence[int], solver: bool = False, key: str = "eval.steps") -> None:
        """Raises ConfigError for numbers of steps that this sampler cannot take, before anything is drawn: none, repeated or
        below 1, without their times on VE, or that the solver's table does not have. key: what to name.
        """
        if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
            wrong = (
                "is empty"
                if not steps
                else f"{min(steps)} is not at least 1"
                if min(steps) < 1
                else "a number stands twice"
            )
            raise ConfigError(
                f"{', '.join(map(str, steps)) or '[]'}: {wrong}; give each number of steps once, as 1,2", key
            )
        for k in steps:
            if solver:
                self.table(k, key)
            elif self.path.name == "ve":
                self.mid_times(k)

    def table(self, steps: int, key: str = "sampler.nfe") -> Table:
        """The solver's coefficients for `steps` network calls. Raises ConfigError where it has none; key: what named them."""
        c = self.config
        if self.path.name == "linear" and c.solver == "dpmpp":
            raise ConfigError("dpmpp is for path ve here; valid are euler, heun, jump", "sampler.solver")
        try:
            return table(self.path, c.solver, steps, c.t_max, c.t_min, c.order, c.shift)
        except ConfigError as error:
            raise (ConfigError(error.reason, key) if error.key == "nfe" else error.under("sampler")) from None

    def labels(self, index: Tensor) -> Tensor | None:
        """The class of each sample, by the law. index: (n,) -> (n,), None without classes."""
        return self.law(index)

    def noise(self, seed: int, index: Tensor) -> Tensor:
        """Unit starting noise of sample `index` (n,) -> (n, ...)."""
        return Random(seed, 0, 0).normal(rng.SAMPLE, index, self.shape)

    def between(self, seed: int, step: int, index: Tensor) -> Tensor:
        """Unit noise that a consistency model adds after `step` calls to sample `index` (n,) -> (n, ...)."""
        return Random(seed, 0, step).normal(rng.RENOISE, index, self.shape)

    def few_steps(self, net: Callable, steps: int, seed: int, index: Tensor) -> Tensor:
        """`steps` network calls as a flow map: consistency sampling on VE, jumps on linear flow. (n, ...)."""
        if self.path.name == "linear":
            return sample_jumps(self._telling(net, index), self.noise(seed, index), steps, self.labels(index))
        mids = self.mid_times(steps)
        return self._onwards(net, self._first(net, seed, index), mids, seed, index)

    def _first(self, net: Callable, seed: int, index: Tensor) -> Tensor:
        """A consistency model's sample of one step."""
        return consistency_first(
            net, self.noise(seed, index) * self.config.t_max, self.config.t_max, self.labels(index)
        )

    def _onwards(self, net: Callable, x_0: Tensor, mids: tuple[float, ...], seed: int, index: Tensor) -> Tensor:
        """That of as many more as there are mid times."""
        noises = [self.between(seed, i + 1, index) for i in range(len(mids))]
        return consistency_onwards(net, x_0, mids, noises, self.labels(index))

    def solve(self, net: Callable, steps: int, seed: int, index: Tensor) -> Tensor:
        """`steps` network calls of the ODE solver, as a diffusion model is sampled; guided if the recipe says so. (n, ...)."""
        c = self.config
        plan = self.table(steps)
        z = self.noise(seed, index) * (c.t_max if self.path.name == "ve" else 1.0)
        return rollout(guided(net, c.guidance), self.path, plan, z, self.labels(index), dense=False)

    @torch.no_grad()
    def draw(self, net: Callable, steps: int, seed: int, index: Tensor, solver: bool = False) -> Tensor:
        """Samples `index` (n,) in data units, float32, on the device. (n, ...)."""
        call = self.solve if solver else self.few_steps
        return call(net, steps, seed, index.to(self.device)).float()

    def draw_each(
        self, net: Callable, steps: tuple[int, ...], seed: int, index: Tensor, solver: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """(k, what `draw` gives for k steps) one after the other, bit for bit; what is common to them is computed once.

        A consistency model's samples of every number of steps go on from one first call, which has the same starts, labels
        and time. Jumps and solvers have nothing in common: other numbers of steps are other grids. Samples are only read.
        """
        if solver or self.path.name == "linear":
            yield from ((k, self.draw(net, k, seed, index, solver)) for k in steps)
            return
        index, mids = index.to(self.device), {k: self.mid_times(k) for k in steps}
        x_0 = self._first(net, seed, index)
        for k in steps:
            yield k, self._onwards(net, x_0, mids[k], seed, index).float()

    def generate(self, net: Callable, steps: int, n: int, seed: int, solver: bool = False, batch: int = 1000) -> Tensor:
        """Samples 0..n-1 in data units, float32. (n, ...) on the CPU."""
        return torch.cat([self.draw(net, steps, seed, index, solver).cpu() for index in torch.arange(n).split(batch)])


class _Starting(Sampler):
    """A Sampler whose starting noise and labels are given, as `Sampler.starting` says."""

    def __init__(self, setting: Sampler, noise: Tensor, labels: Tensor | None, like: Tensor) -> None:
        super().__init__(setting.path, setting.config, setting.shape, setting.law, setting.device)
        self._noise, self._labels, self._like = noise, labels, like
        self.scales = setting.scales

    def noise(self, seed: int, index: Tensor) -> Tensor:
        return self._noise.to(index.device)[index]

    def between(self, seed: int, step: int, index: Tensor) -> Tensor:
        return super().between(seed, step, self._like.to(index.device)[index])

    def omega(self, index: Tensor) -> Tensor:
        return super().omega(self._like.to(index.device)[index])

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels.to(index.device)[index]


def check(config: SamplerConfig, path: str, steps: tuple[int, ...]) -> None:
    """Raises ValueError when a recipe asks for steps or a solver that its sampler does not have."""
    setting = Sampler(ProbabilityPath(path), config, (1,), Law.uniform(0), torch.device("cpu"))
    if path == "ve":
        _check_mid_counts(config)
    setting.check_steps(steps)
    setting.table(config.teacher_steps, "sampler.teacher_steps")
    for s in steps if path == "ve" else ():
        times = setting.mid_times(s)
        if list(times) != sorted(set(times), reverse=True) or not all(config.t_min < t < config.t_max for t in times):
            between = f"from below sampler.t_max ({config.t_max:g}) to above sampler.t_min ({config.t_min:g})"
            raise ConfigError(f"{list(times)} for {s} steps must fall, {between}", "sampler.mid_times")


def _check_mid_counts(config: SamplerConfig) -> None:
    """One time fewer than steps for each number of steps, asked for or not."""
    for steps, times in config.mid_times.items():
        if steps < 2 or len(times) != steps - 1:
            need = f"it needs {steps - 1}" if steps > 1 else "and a single step has no time in between"
            raise ConfigError(f"has {len(times)} times for {steps} steps, {need}", "sampler.mid_times")
