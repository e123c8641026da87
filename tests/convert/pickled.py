"""Pickles in the style of EDM and EDM2, written here: modules that carry their source and are rebuilt by a persistence function.

Only the format is imitated: the names under which the classes are pickled, the record of a persistent object, plain layers
of torch inside. What loading them as their authors do would run is in the source that each carries.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source in a checkpoint was executed')\n"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called: the reader has its own")


class EasyDict(dict):
    """A dictionary under the name that those files give it."""


class Persistent:
    """Pickled as a record of class name, source and state."""

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, (meta | {"state": dict(self.__dict__)},), None


class Precond(Persistent, nn.Module):
    """A little network: layers of torch, a parameter of its own, buffers that are kept and one that is not."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (), dict(kwargs)
        self.sigma_data = np.float32(kwargs.get("sigma_data", 0.5))
        width = kwargs.get("width", 8)
        self.unet = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3, bias=False))
        self.gain = nn.Parameter(torch.randn([]))
        self.register_buffer("freqs", torch.randn(width, dtype=torch.float64))
        self.register_buffer("count", torch.arange(width))
        self.register_buffer("passing", torch.randn(4), persistent=False)


class Node(Persistent, nn.Module):
    """A module of a tree given by dotted names."""

    def __init__(self) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (), {}


def tree(state: dict[str, torch.Tensor], buffers: tuple[str, ...] = (), **kwargs) -> Node:
    """Modules within modules that hold `state`; those whose names end in `buffers` as buffers. kwargs: as built with."""
    root = Node()
    root._init_kwargs = kwargs
    for name, tensor in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        keep = node.register_buffer if name.endswith(buffers) else node.register_parameter
        keep(last, tensor.clone() if name.endswith(buffers) else nn.Parameter(tensor.clone(), False))
    return root


class Encoder(Persistent):
    """An encoder with normalisation constants, as EDM2's has."""

    def __init__(self) -> None:
        self._init_args, self._init_kwargs = (), {}
        self.vae_name, self.scale = "some/vae", np.float32([0.5, 0.25])
        self.bias = np.float32([0.0, -1.0])
        self.table = np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2))


@contextlib.contextmanager
def _named():
    """Inside, the classes above have the names of the files' own modules."""
    modules = {"torch_utils": {}, "torch_utils.persistence": {}, "dnnlib": {}, "dnnlib.util": {}}
    modules["torch_utils.persistence"]["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    modules["dnnlib.util"]["EasyDict"] = EasyDict
    before = {name: sys.modules.get(name) for name in modules}
    old = _reconstruct_persistent_obj.__module__, EasyDict.__module__
    for name, members in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    try:
        yield
    finally:
        _reconstruct_persistent_obj.__module__, EasyDict.__module__ = old
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def dumps(thing, protocol: int = 4) -> bytes:
    """The pickle of `thing` under those names."""
    with _named():
        return pickle.dumps(thing, protocol)


def network(path: Path, half: bool = True, protocol: int = 4, **kwargs) -> Precond:
    """Writes a snapshot `{ema, encoder, dataset_kwargs, loss_fn}` to `path`; returns the network in it."""
    net = Precond(**kwargs).requires_grad_(False)
    net = net.half() if half else net
    data = EasyDict(encoder=Encoder(), dataset_kwargs=EasyDict(path="x.zip", use_labels=True), loss_fn=None, ema=net)
    path.write_bytes(dumps(data, protocol))
    return net
