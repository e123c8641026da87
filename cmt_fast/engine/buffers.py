"""Parameters as flat buffers and by name: what the engines share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


def flat(net: nn.Module) -> Tensor:
    """All parameters in one fp32 vector, in named order. (P,)."""
    return torch.cat([p.detach().float().reshape(-1) for p in net.parameters()])


def bind(net: nn.Module, buffer: Tensor, grad: bool = False) -> None:
    """Make the parameters (or, with `grad`, their gradients) views into `buffer` (P,)."""
    every = list(net.named_parameters())
    for (name, p), part in zip(every, buffer.split([p.numel() for _, p in every])):
        if grad:
            p.grad = part.view(p.shape)
        elif p.is_meta:
            place(net, name, part.view(p.shape), p.requires_grad)
        else:
            p.data = part.view(p.shape)


def place(net: nn.Module, name: str, value: Tensor, requires_grad: bool) -> nn.Parameter:
    """Put a parameter with this memory where `net` has one of that name, which may have none."""
    owner, _, last = name.rpartition(".")
    p = nn.Parameter(value, requires_grad)
    setattr(net.get_submodule(owner), last, p)
    return p


def count(net: nn.Module) -> int:
    """Numbers of all parameters."""
    return sum(p.numel() for p in net.parameters())


def without_memory(net: nn.Module) -> bool:
    """Whether the parameters are on the meta device, to be filled one by one."""
    return any(p.is_meta for p in net.parameters())


def to(net: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device; parameters without memory stay without."""
    if not without_memory(net):
        return net.to(device)
    for module in net.modules():
        for name, x in module._buffers.items():
            module._buffers[name] = x if x is None else x.to(device)
    return net


class Unread(NamedTuple):
    """A frozen network whose parameters have no memory, and its weights, by name, read as they are asked for."""

    net: nn.Module
    weights: Mapping[str, Tensor]


@torch.no_grad()
def pour(unread: Unread, device: torch.device) -> Iterator[nn.Module]:
    """Read the weights in the order that they come in, so that a file is read and hashed once. A module is given when all of
    its own parameters have memory on `device`, in fp32, without gradients, and once it has done what a frozen module does
    once (`fold`).
    """
    net, weights = to(unread.net, device), unread.weights
    own = constants(net)
    left = {prefix: len(list(module.parameters(recurse=False))) for prefix, module in net.named_modules()}
    for name in weights:
        value = weights[name]
        if name in own:
            own[name].copy_(value)
            continue
        place(net, name, value.to(device, torch.float32), requires_grad=False)
        prefix = name.rpartition(".")[0]
        left[prefix] -= 1
        if not left[prefix]:
            module = net.get_submodule(prefix)
            if hasattr(module, "fold"):
                module.fold()
            yield module


def narrow_stream(net: nn.Module, precision: str) -> None:
    """With precision bf16-stream, let what has a residual stream keep it in bf16 wherever autocast asks for bf16."""
    for module in net.modules():
        if hasattr(module, "bf16_stream"):
            module.bf16_stream = precision == "bf16-stream"


def constants(net: nn.Module) -> dict[str, Tensor]:
    """What a network has drawn once and keeps: its persistent buffers, by name; no optimizer or EMA touches them."""
    return {
        f"{prefix}.{name}" if prefix else name: x
        for prefix, module in net.named_modules()
        for name, x in module._buffers.items()
        if x is not None and name not in module._non_persistent_buffers_set
    }


def named(net: nn.Module, buffer: Tensor) -> dict[str, Tensor]:
    """The buffer (P,) as tensors by parameter name, and the network's constants."""
    return parts(net, buffer) | constants(net)


def parts(net: nn.Module, buffer: Tensor) -> dict[str, Tensor]:
    """The buffer (P,) as tensors by parameter name."""
    split = buffer.split([p.numel() for p in net.parameters()])
    return {name: part.view(p.shape) for (name, p), part in zip(net.named_parameters(), split)}


def check_names(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError when names or shapes differ, naming the first that does."""
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"checkpoint does not fit the model: {len(missing)} keys missing{_first(missing)}, "
            f"{len(extra)} unknown{_first(extra)}"
        )
    given = getattr(weights, "shapes", None) or {name: tuple(w.shape) for name, w in weights.items()}
    for name, shape in shapes.items():
        if tuple(given[name]) != tuple(shape):
            raise ValueError(f"checkpoint does not fit the model: {name} is {tuple(given[name])}, not {tuple(shape)}")


@torch.no_grad()
def load_named(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name, in the order that they come in. Raises ValueError when names or shapes differ, naming the first
    that does."""
    check_fits(net, weights)
    own = dict(net.named_parameters()) | constants(net)
    for name in weights:
        own[name].copy_(weights[name])


@torch.no_grad()
def take(into: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy what has a place, in the order that it comes in; what has none is fetched too: a file is sound once all of it was
    read. Raises KeyError naming what is missing."""
    for name in into.keys() - weights.keys():
        raise KeyError(name)
    for name in weights:
        value = weights[name]
        if name in into:
            into[name].copy_(value)


def check_fits(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError when names or shapes of weights are not the network's, naming the first that differs."""
    own = dict(net.named_parameters()) | constants(net)
    check_names({name: tuple(x.shape) for name, x in own.items()}, weights)


def frame(net: nn.Module) -> nn.Module:
    """The module without its weights: parameters that hold no memory, buffers that are copies."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo=empty)


def fill(frame: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A frozen fp32 module of its own from a frame and weights by name, in evaluation mode."""
    net = copy.deepcopy(frame)
    for name, _ in list(net.named_parameters()):
        place(net, name, weights[name].to(device, torch.float32), requires_grad=False)
    return net.to(device).eval()


def read(unread: Unread, device: torch.device) -> nn.Module:
    """The whole frozen network on `device`, in evaluation mode."""
    for _ in pour(unread, device):
        pass
    return unread.net.eval()


@torch.no_grad()
def constrain(net: nn.Module) -> None:
    """Let every module that holds its weights to a condition, EDM2's unit length, restore it after a change."""
    for module in net.modules():
        if hasattr(module, "constrain"):
            module.constrain()


def constrained(net: nn.Module) -> bool:
    """Whether any part of the network has weight constraints."""
    return any(hasattr(m, "constrain") for m in net.modules())


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
