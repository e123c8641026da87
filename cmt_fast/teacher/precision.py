"""The teacher whose trajectories a stage trains on: its networks and guidance, and the precision it computes them in.

A precision below fp32 is measured before it is used: the endpoints of a few of the stage's own trajectories, against the
same in fp32. What is chosen is kept in every checkpoint's manifest, so a run that is taken up again makes the same
trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cmt_kernels import processor
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Stage
from cmt_fast.diffusion.guidance import Autoguided, Guided, Net, guided
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.models.fp8 import Fp8Linear, in_fp8, shared
from cmt_fast.runtime import distributed, machine
from cmt_fast.teacher.pool import Drawn, scales, starts

PRECISIONS = ("fp8", "bf16", "tf32", "fp32")  # from cheap to exact
MEASURED = 32  # trajectories


class Teacher:
    """A stage's teacher in every precision; network: the name of a stage -> its frozen network, as the engine holds it."""

    def __init__(
        self, name: str, stage: Stage, network: Callable[[str], Any], path: ProbabilityPath, device: torch.device
    ) -> None:
        assert stage.trajectories is not None and stage.teacher is not None
        self.name, self.stage, self.network, self.path, self.device = name, stage, network, path, device
        self.config = stage.trajectories
        self._made: dict[tuple[str, str], Any] = {}

    @property
    def sharded(self) -> bool:
        """Whether its weights are gathered layer by layer: then a rollout is no CUDA graph, and nothing is in fp8."""
        return not all(isinstance(self.network(n), nn.Module) for n in self._names())

    def net(self, precision: str) -> Net:
        """Its networks in a precision, guided as the stage says; to be called inside `computing(precision)`."""
        nets = [self._in(precision, n) for n in self._names()]
        if len(nets) == 2:
            assert self.stage.autoguidance is not None
            return Autoguided(*nets, self.stage.autoguidance.scale)
        if self.config.omega_max != 1:
            return Guided(nets[0], 1.0)  # by the scale of each row (`rollout`)
        return guided(nets[0], self.config.guidance)

    def computing(self, precision: str) -> Callable[[], AbstractContextManager]:
        """What its rollouts are run in."""
        if precision in ("fp8", "bf16") and not self.sharded:
            return partial(torch.autocast, self.device.type, torch.bfloat16)
        return partial(_tf32, precision == "tf32") if self.device.type == "cuda" else nullcontext

    def choose(self, seed: int, index: int, shape: tuple[int, ...], classes: Drawn) -> dict[str, Any]:
        """A stage's precision as it begins: {"precision", "errors" of endpoints by precision, "limit"}; the same on all ranks.

        Under auto also "refused": {precision: why it was not tried}.

        Raises ConfigError for a precision that this machine, engine or network does not have, or that errs by too much.
        """
        wanted, limit = self.config.precision, self.config.precision_limit
        precision = self.stage.products if wanted == "stage" else wanted
        if precision == "fp16":  # a student's format, whose gradients are scaled; rollouts have none
            precision = "fp32"
        if precision != "auto":
            self._check(precision)
        if precision == "fp32" or (precision == "tf32" and self.device.type == "cpu"):  # there it is fp32
            return {"precision": precision, "errors": {}, "limit": limit}
        ids = torch.arange(MEASURED, device=self.device)
        dropout = self.stage.trajectory_dropout
        x, labels = starts(Random(seed, index, 0), ids, shape, classes, self.path, self.config, dropout)
        c, guide = self.config, scales(Random(seed, index, 0), ids, self.config)
        plan = table(self.path, c.solver, c.nfe, c.t_max, c.t_min, c.order, c.shift)

        def ends(precision: str) -> Tensor:
            net, n = self.net(precision), c.rollout_batch
            with self.computing(precision)():
                parts = [
                    rollout(net, self.path, plan, part, y, dense=False, guide=own)
                    for part, y, own in zip(x.split(n), _split(labels, n, len(x)), _split(guide, n, len(x)))
                ]
            return torch.cat(parts).double()

        auto = precision == "auto"
        refused = {f: why for f in PRECISIONS if (why := self._why_not(f))} if auto else {}
        candidates = [f for f in PRECISIONS if f not in refused] if auto else [precision]
        exact, errors = ends("fp32") if candidates[0] != "fp32" else torch.zeros(1), {}
        for candidate in candidates:
            if candidate == "fp32":
                precision = candidate
                break
            error = float((ends(candidate) - exact).norm() / exact.norm())
            error = error if math.isfinite(error) else 1e9
            errors[candidate] = max(e for (e,) in distributed.every_rank([error]))
            if precision == "auto" and errors[candidate] <= limit:
                precision = candidate
                break
        self._made = {key: net for key, net in self._made.items() if key[0] == precision}
        about = {"precision": precision, "errors": errors, "limit": limit} | ({"refused": refused} if refused else {})
        if errors.get(precision, 0.0) > limit and wanted != "stage":
            raise ConfigError(
                f"{self.name}.trajectories.precision: {precision} moves the endpoints by {errors[precision]:.2%} of their size, "
                f"more than precision_limit, {limit:.2%}; auto takes the cheapest precision within it"
            )
        return about

    def lines(self, about: dict[str, Any]) -> list[str]:
        """What a person should know of the choice."""
        precision, errors, limit = about["precision"], about["errors"], about["limit"]
        if not errors:
            refused = about.get("refused")
            return (
                [f"teacher in {precision}: {'; '.join(f'{f}: {why}' for f, why in refused.items())}"] if refused else []
            )
        said = ", ".join(f"{f} {e:.2%}" for f, e in errors.items())
        lines = [f"teacher in {precision}: endpoints of {MEASURED} trajectories err by {said} (limit {limit:.2%})"]
        if errors.get(precision, 0.0) > limit:
            lines.append(
                "warning: that is beyond trajectories.precision_limit; precision: fp32 or auto stays within it"
            )
        if precision == "fp8" and self.device.type == "cpu":
            lines.append("fp8 is emulated on a CPU: its numbers, not its speed")
        return lines

    def check(self, about: dict[str, Any]) -> None:
        """Raises ConfigError when a stage that goes on cannot have the precision that it began with."""
        self._check(about["precision"])

    def _names(self) -> list[str]:
        guide, teacher = self.stage.autoguidance, self.stage.teacher
        assert teacher is not None
        return [teacher, guide.network] if guide and guide.trajectories else [teacher]

    def _in(self, precision: str, name: str) -> Any:
        net = self.network(name)
        if precision in ("fp32", "tf32"):
            return net
        if (precision, name) not in self._made:
            make = in_fp8 if precision == "fp8" else shared
            self._made[precision, name] = make(net) if isinstance(net, nn.Module) else net.in_bf16
        return self._made[precision, name]

    def _check(self, precision: str) -> None:
        reason = self._why_not(precision, asked=True)
        if reason:
            raise ConfigError(f"{self.name}.trajectories.precision: {precision!r} cannot be had: {reason}")

    def _why_not(self, precision: str, asked: bool = False) -> str | None:
        """Why a precision cannot be had. Under auto a CPU has what is faster there than fp32."""
        reason = missing(precision, self.device, asked)
        if reason or precision != "fp8":
            return reason
        if self.sharded:
            return "the teacher is sharded over processes (zero_teacher: whole holds it whole)"
        try:
            for name in self._names():
                self._in(precision, name)
        except ValueError as error:
            return str(error)
        return None


def missing(precision: str, device: torch.device, asked: bool = False) -> str | None:
    """Why a device does not have a precision: None where it does, or where it can imitate one that was asked for by name."""
    if precision == "fp32":
        return None
    if device.type == "cpu":
        return None if asked else slower(precision)
    least = (8, 9) if precision == "fp8" else (8, 0)
    if torch.cuda.get_device_capability(device) < least:
        return f"{torch.cuda.get_device_name(device)} has none, compute capability {least[0]}.{least[1]} has"
    if precision == "fp8":
        try:  # which of torch's versions multiplies rows of scales on which GPU is not written down anywhere
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                Fp8Linear(nn.Linear(16, 16).to(device))(torch.ones(16, 16, device=device))
        except RuntimeError as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def slower(precision: str) -> str | None:
    """Why a CPU takes fp32 rather than a precision, None where it computes faster in it: of bf16 a product is timed.

    Every rank must call it: all do as rank 0 finds.
    """
    if precision != "bf16":
        return {"fp8": "a CPU emulates it", "tf32": "on a CPU it is fp32"}[precision]
    if not processor.timed():
        return f"CMT_PROCESSOR={processor.USUAL} times nothing"
    found = product_speed() if distributed.rank() == 0 else 0.0
    speed = distributed.every_rank([found])[0][0]
    if speed >= processor.WORTH:
        return None
    return f"a product of matrices runs {speed:.2f} times as fast as in fp32 on {processor.model()}"


def product_speed() -> float:
    """How many times as fast as in fp32 this processor computes x W^T + b in bf16, x: (1024, 512), W: (512, 512)."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(*size, generator=generator) for size in ((1024, 512), (512, 512), (512,))]
    low = [x.bfloat16() for x in exact]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return processor.ratio("linear bf16", lambda: F.linear(*exact), lambda: F.linear(*low))


def check(name: str, stage: Stage, device: torch.device) -> None:
    """Raises ConfigError, before anything is trained, for a precision that this device does not have."""
    t = stage.trajectories
    if t and not t.cache and t.precision not in ("stage", "auto"):
        reason = missing(t.precision, device, asked=True)
        if reason:
            raise ConfigError(f"{name}.trajectories.precision: {t.precision!r} cannot be had: {reason}")


@contextmanager
def _tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    machine.allow_tf32(allowed)
    try:
        yield
    finally:
        machine.allow_tf32(before)


def _split(labels: Tensor | None, size: int, n: int) -> list[Tensor | None]:
    return [None] * -(-n // size) if labels is None else list(labels.split(size))
