"""The local engine: forward under autocast, backward, one optimizer step with its EMA tracks, and their state.

Parameters, gradients, moments and EMAs are flat fp32 buffers, the module's parameters views into one
of them: one kernel call updates all, one call sums over ranks, and a checkpoint is a few tensors.
"""

from __future__ import annotations

import copy

import torch
from cmt_kernels import adamw_ema
from torch import Tensor, nn

from cmt_fast import distributed, ema, optimizer
from cmt_fast.compiled import compile_network
from cmt_fast.schema import Stage


class LocalEngine:
    """One module trained by AdamW. `engine(...)` is the module's forward in the stage's precision."""

    def __init__(self, net: nn.Module, stage: Stage, device: torch.device) -> None:
        self.net, self.stage, self.device = net.to(device), stage, device
        self.step_count = 0
        self.p = flat(net)
        self.g = torch.zeros_like(self.p)
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.emas = [self.p.clone() for _ in stage.ema]
        bind(net, self.p)
        bind(net, self.g, grad=True)
        self.forward = compile_network(net) if stage.compile else net

    def __call__(self, *args):
        """The module's forward; each call has an autocast of its own, so no cached cast outlives a no-grad pass."""
        with self._autocast():
            return self.forward(*args)

    def eager(self, *args):
        """The same forward, never compiled."""
        with self._autocast():
            return self.net(*args)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss."""
        loss.backward()

    def step(self, lr: float) -> Tensor:
        """Clip, AdamW or RAdam, EMAs; gradients are averaged over ranks and then zeroed. Returns their norm before clipping."""
        distributed.mean_(self.g)
        s = self.stage
        self.step_count += 1
        betas = [ema.beta(profile, self.step_count) for profile in s.ema]
        lr, eps, decay = optimizer.settings(s, self.step_count, lr)
        norm = adamw_ema(
            self.p, self.g, self.m, self.v, self.emas, betas, self.step_count, lr, s.betas, eps, decay, s.clip
        )
        self.g.zero_()
        constrain(self.net)
        return norm

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take a parent's weights: student and every EMA track start there."""
        load_named(self.net, weights)
        constrain(self.net)
        for e in self.emas:
            e.copy_(self.p)

    def average(self, index: int = 0) -> nn.Module:
        """A frozen copy of the module whose parameters are EMA track `index` itself, not a copy of it."""
        net = copy.deepcopy(self.net)
        for p in net.parameters():
            p.grad = None
            p.requires_grad_(False)
        bind(net, self.emas[index])
        return net.eval()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a restart needs, file name -> named tensors."""
        tracks = {f"ema-{i}": named(self.net, e) for i, e in enumerate(self.emas)}
        return {"model": named(self.net, self.p), **tracks, "optimizer": {"m": self.m, "v": self.v}}

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Restore what `state` gave after `step` steps."""
        load_named(self.net, state["model"])
        for i, e in enumerate(self.emas):
            e.copy_(torch.cat([state[f"ema-{i}"][name].reshape(-1) for name, _ in self.net.named_parameters()]))
        self.m.copy_(state["optimizer"]["m"])
        self.v.copy_(state["optimizer"]["v"])
        self.step_count = step


def flat(net: nn.Module) -> Tensor:
    """All parameters in one fp32 vector, in named order. (P,)."""
    return torch.cat([p.detach().float().reshape(-1) for p in net.parameters()])


def bind(net: nn.Module, buffer: Tensor, grad: bool = False) -> None:
    """Make the parameters (or, with `grad`, their gradients) views into `buffer` (P,)."""
    for p, part in zip(net.parameters(), buffer.split([p.numel() for p in net.parameters()])):
        if grad:
            p.grad = part.view(p.shape)
        else:
            p.data = part.view(p.shape)


def constrain(net: nn.Module) -> None:
    """Let every module that holds its weights to a condition, EDM2's unit length, restore it after a change."""
    for module in net.modules():
        if hasattr(module, "constrain"):
            module.constrain()


def constants(net: nn.Module) -> dict[str, Tensor]:
    """What a network has drawn once and keeps: its persistent buffers, by name; no optimizer or EMA touches them."""
    parameters = dict(net.named_parameters())
    return {name: x for name, x in net.state_dict().items() if name not in parameters}


def named(net: nn.Module, buffer: Tensor) -> dict[str, Tensor]:
    """The buffer (P,) as tensors by parameter name, and the network's constants."""
    parts = buffer.split([p.numel() for p in net.parameters()])
    return {name: part.view(p.shape) for (name, p), part in zip(net.named_parameters(), parts)} | constants(net)


@torch.no_grad()
def load_named(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights by name. Raises ValueError when names or shapes differ, naming the first that does."""
    own = dict(net.named_parameters()) | constants(net)
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"checkpoint does not fit the model: {len(missing)} keys missing{_first(missing)}, "
            f"{len(extra)} unknown{_first(extra)}"
        )
    for name, p in own.items():
        if p.shape != weights[name].shape:
            raise ValueError(
                f"checkpoint does not fit the model: {name} is {tuple(weights[name].shape)}, not {tuple(p.shape)}"
            )
        p.copy_(weights[name])


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
