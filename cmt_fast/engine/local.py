"""The local engine: forward under autocast, backward, one optimizer step with its EMA tracks, and their state.

Parameters, gradients, moments and EMAs are flat fp32 buffers, the module's parameters views into one
of them: one kernel call updates all, one call sums over ranks, and a checkpoint is a few tensors.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping

import cmt_kernels
import torch
from cmt_kernels import adamw_ema
from torch import Tensor, nn

from cmt_fast.config.schema import Stage
from cmt_fast.engine import buffers, ema, optimizer, sums
from cmt_fast.engine.buffers import Unread, bind, constrain, constrained, flat, load_named, named, narrow_stream, parts
from cmt_fast.engine.compile import compile_network
from cmt_fast.engine.scaling import LossScale
from cmt_fast.engine.snapshot import Place, Snapshot
from cmt_fast.runtime import distributed
from cmt_fast.storage.checkpoint import Tensors


class LocalEngine:
    """One module trained by AdamW. `engine(...)` is the module's forward in the stage's precision."""

    def __init__(
        self,
        net: nn.Module,
        stage: Stage,
        device: torch.device,
        grad_accum_steps: int = 1,
        lends: bool | None = None,
        numbers: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """net: with its weights, or without memory (models/deferred.py); numbers: what such a one begins with, by name.

        grad_accum_steps: forwards and backwards that make up one step, each on its share of the rows.

        lends: whether linears read weights that were cast once a step and add their gradients themselves
        (models/products.py); by default on a GPU, in bf16, not compiled.
        """
        bare = buffers.without_memory(net)
        self.net, self.stage, self.device = buffers.to(net, device), stage, device
        self.grad_accum_steps = grad_accum_steps
        self.step_count = self.skipped = 0
        self.checking, self.checks = False, dict[str, Tensor]()
        self.stuck = torch.zeros((), dtype=torch.bool, device=device)
        narrow_stream(net, stage.precision)
        self.p = torch.zeros(buffers.count(net), device=device) if bare else flat(net)
        bind(net, self.p)  # from here on the weights are held once
        own = named(net, self.p)
        for name, value in numbers:
            own[name].copy_(value)
        self.g = torch.zeros_like(self.p)
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.emas = [self.p.clone() for _ in stage.ema]
        bind(net, self.g, grad=True)
        wanted = device.type == "cuda" if lends is None else lends
        self.half = self.p.bfloat16() if wanted and stage.products == "bf16" and not stage.compile else None
        if self.half is not None:
            self._lend(self.half)
        self.scale = LossScale(device) if stage.products == "fp16" else None
        self.forward = compile_network(net) if stage.compile else net

    def _lend(self, half: Tensor) -> None:
        """The bf16 copy of the flat parameters, to the modules that take parts of it."""
        copies = parts(self.net, half)
        for prefix, module in self.net.named_modules():
            if hasattr(module, "lend"):
                names = [name for name, _ in module.named_parameters(recurse=False)]
                module.lend({name: copies[f"{prefix}.{name}" if prefix else name] for name in names})

    def share_half(self, other: LocalEngine) -> None:
        """Lend what another engine lends, whose parameters this one has taken over."""
        self.half = other.half
        if self.half is not None:
            self._lend(self.half)

    def _changed(self) -> None:
        """To be called after the parameters were, by any but the optimizer."""
        if self.half is not None:
            self.half.copy_(self.p)

    def __call__(self, *args, **named):
        """The module's forward; each call has an autocast of its own, so no cached cast outlives a no-grad pass."""
        with self._autocast():
            return self.forward(*args, **named)

    def wide(self, *args, **named):
        """The module's forward in fp32."""
        with self._autocast(wide=True):
            return self.forward(*args, **named)

    def eager(self, *args, wide: bool = False, **named):
        """The same forward, never compiled; wide: in fp32."""
        with self._autocast(wide):
            return self.net(*args, **named)

    @contextlib.contextmanager
    def _autocast(self, wide: bool = False) -> Iterator[None]:
        """wide: rows in fp32 take the ops that the others take: what is computed again in the backward pass must be the same."""
        dtype = torch.float16 if self.scale else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.stage.half and not wide), self._ops():
            yield

    def _ops(self) -> contextlib.AbstractContextManager[None]:
        """fp16 takes the reference of every op: the kernels know fp32 and bf16."""
        return cmt_kernels.use("reference") if self.scale else contextlib.nullcontext()

    def scaling(self) -> dict[str, float]:
        """The loss's scale and the steps that were skipped; nothing outside of fp16."""
        return self.scale.told() if self.scale else {}

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one of the step's losses; their mean is what is differentiated."""
        loss = self.scale.scaled(loss) if self.scale else loss  # and it remembers a loss that is not finite
        with self._ops():  # activations may be recomputed here
            (loss if self.grad_accum_steps == 1 else loss / self.grad_accum_steps).backward()

    def step(self, lr: float) -> Tensor:
        """Clip, AdamW or RAdam, EMAs, constraints; gradients are averaged over ranks. Returns their norm before clipping.

        A gradient that is not finite on any rank changes nothing on all of them: the norm is NaN, and no later step changes
        anything until `skip`. The host does not wait to know. In fp16 the scale is to blame first: it is halved, the norm 0.
        """
        distributed.mean_(self.g)
        s = self.stage
        self.step_count += 1
        n = self.step_count - self.skipped
        if self.scale:
            taken = self.scale.unscale(self.g)
            if taken == "skipped":
                self.g.zero_()
                return self.g.new_zeros(())
            n -= self.scale.skipped  # the optimizer and the EMA tracks know nothing of them
        self.g[:1].masked_fill_(self.stuck, torch.nan)
        if self.checking:
            self.checks = {"gradient": sums.partial(self.g)}
        betas = [ema.beta(profile, n) for profile in s.ema]
        lr, eps, decay = optimizer.settings(s, n, lr)
        norm = adamw_ema(
            *(self.p, self.g, self.m, self.v, self.emas, betas, n, lr, s.betas, eps, decay),
            *(s.grad_clip_norm, self.half),
        )
        self.stuck |= norm.isnan()
        if constrained(self.net):
            self._constrain(norm)
        self.g.zero_()
        if self.checking:
            self.checks["parameters"] = sums.partial(self.p)
        return norm

    def _constrain(self, norm: Tensor) -> None:
        """Weight constraints after a step, unless its norm is NaN; the gradient's memory holds what weights were."""
        self.g.copy_(self.p)
        constrain(self.net)
        torch.where(norm.isnan(), self.g, self.p, out=self.p)
        self._changed()

    def skip(self, step: int) -> None:
        """Go on after `step` steps, the last of which was not finite: for the optimizer it was none."""
        self.step_count, self.skipped = step, self.skipped + 1
        self.stuck.zero_()

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take a parent's weights: student and every EMA track start there."""
        load_named(self.net, weights)
        constrain(self.net)
        self._changed()
        for e in self.emas:
            e.copy_(self.p)

    def average(self, index: int = 0) -> nn.Module:
        """A frozen copy of the module whose parameters are EMA track `index` itself, not a copy of it."""
        net = buffers.frame(self.net).requires_grad_(False)
        bind(net, self.emas[index])
        return net.eval()

    def copy(self) -> nn.Module:
        """A module of its own with the student's present weights."""
        return copy.deepcopy(self.net)

    def frozen(self, net: nn.Module | Unread) -> nn.Module:
        """A teacher is held whole."""
        return buffers.read(net, self.device) if isinstance(net, Unread) else net

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything a restart needs, file name -> named tensors; the optimizer's are `m.NAME` and `v.NAME`.

        They are views, each fetched when it is written: on a GPU the host holds one at a time.
        """
        tracks = {f"ema-{i}": named(self.net, e) for i, e in enumerate(self.emas)}
        files = {"model": named(self.net, self.p), **tracks, "optimizer": self._moments() | self._extra()}
        return {file: _viewed(tensors) for file, tensors in files.items()}

    def snapshot_bytes(self) -> int:
        """Of host memory, that a whole snapshot takes on this rank."""
        return 4 * self.p.numel() * (3 + len(self.emas)) if distributed.rank() == 0 else 0

    def snapshot(self, files: Collection[str] | None = None) -> Snapshot:
        """`state` as it is now, copied to the host of the first rank; files: those alone."""
        writes = distributed.rank() == 0
        ends = itertools.accumulate(p.numel() for p in self.net.parameters())
        sizes = {name: p.numel() for name, p in self.net.named_parameters()}
        places = {name: Place(0, end - n, 0, n) for (name, n), end in zip(sizes.items(), ends)} if writes else {}
        shapes = {name: tuple(p.shape) for name, p in self.net.named_parameters()}
        flats = {"p": self.p, "m": self.m, "v": self.v} | {f"ema-{i}": e for i, e in enumerate(self.emas)}
        held = {key: [flat] if writes else [] for key, flat in flats.items()}
        return Snapshot(shapes, places, held, buffers.constants(self.net), files, False, self._extra())

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Restore what `state` gave after `step` steps."""
        load_named(self.net, state["model"])
        self._changed()
        for i, e in enumerate(self.emas):
            buffers.take(parts(self.net, e), state[f"ema-{i}"])
        extra = self._extra()
        buffers.take(self._moments() | extra, state["optimizer"])
        if self.scale:
            self.scale.load(extra["loss_scale"])
        self.step_count = step

    def close(self) -> None:
        """Nothing: the memory is free with the last reference to the engine."""

    def _moments(self) -> dict[str, Tensor]:
        """Of the optimizer, as views by name."""
        return {f"{k}.{n}": x for k in "mv" for n, x in parts(self.net, getattr(self, k)).items()}

    def _extra(self) -> dict[str, Tensor]:
        """What is kept beside the moments."""
        return {"loss_scale": self.scale.state()} if self.scale else {}


def _viewed(tensors: dict[str, Tensor]) -> Tensors:
    return Tensors({name: tuple(tensors[name].shape) for name in sorted(tensors)}, tensors.__getitem__)
