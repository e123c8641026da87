"""Pickles of EDM, EDM2 and StyleGAN read without running anything in them.

Such a file is the pickle of `{"ema": <module>, ...}`, and loading it as its authors do executes the source code stored in
it. Here its opcodes are counted first and those that such files never hold are refused (opcodes.py); every
constructor that it names is replaced by an inert one, or refused (inert.py); then the tree is walked for tensors and plain
data. torch is not imported. sandbox.py does this in a process of its own.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from typing import Any, BinaryIO

import numpy as np

from cmt_fast.safe_pickle.inert import CONSTRUCTORS, NUMPY, Array, Holder, Tensor, holder_class
from cmt_fast.safe_pickle.opcodes import Refused, scan, shown

MAX_VISITS = 500_000  # objects looked at when the tree is walked
MAX_DEPTH = 64


class _Unpickler(pickle.Unpickler):
    """Names resolve in the table above; torch's own layers become holders; everything else is refused."""

    def find_class(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a constructor's name is no text")
        found = CONSTRUCTORS.get(f"{module}.{name}")
        if found is not None:
            return found
        if module.startswith("torch.nn.modules.") and name.isidentifier() and name[0].isupper():
            return holder_class(f"{module}.{name}")
        raise Refused(f"it names {shown(module)}.{shown(name)}, which no checkpoint needs")

    def persistent_load(self, pid):
        raise Refused("it refers to objects outside itself")


def parse(file: BinaryIO, size: int) -> Any:
    """The object of a pickle of `size` bytes, made of plain data and the inert classes of this page. Raises Refused."""
    try:
        scan(file, size)
        if file.tell() != size:
            raise Refused(f"{size - file.tell()} bytes follow its end")
        file.seek(0)
        return _Unpickler(file, encoding="latin1").load()
    except Refused:
        raise
    except MemoryError:
        raise Refused("it asks for more memory than a file of its size needs") from None
    except Exception as error:  # the unpickler and NumPy raise nearly every kind for a damaged file
        raise Refused(f"it is damaged ({type(error).__name__}: {shown(str(error))})") from None


class _Walk:
    """Collects tensors by dotted name and, apart, what is plain data. Shared and circular parts are visited on a budget."""

    def __init__(self, size: int) -> None:
        self.visits, self.room, self.tensors = 0, 2 * size + 4096, {}

    def visit(self, depth: int) -> None:
        self.visits += 1
        if self.visits > MAX_VISITS or depth > MAX_DEPTH:
            raise Refused("its parts refer to each other without end")

    def tree(self, name: str, value: Any, depth: int = 0) -> Any:
        """Adds the tensors of `value` under `name`; returns what is known of it besides."""
        self.visit(depth)
        value = value.tensor if isinstance(value, Array) else value
        if isinstance(value, Tensor):
            self.add(name, value)
            return None
        if isinstance(value, Holder) and "_modules" in value.state:
            self.module(name, value, depth)
            return self.about(value, depth)
        if isinstance(value, dict):
            return {key: self.tree(_join(name, key), v, depth + 1) for key, v in value.items()}
        return self.about(value, depth) if isinstance(value, Holder) else self.plain(value, depth)

    def module(self, name: str, module: Holder, depth: int) -> None:
        self.visit(depth)
        state = module.state
        passing = state.get("_non_persistent_buffers_set") or set()
        for kind in ("_parameters", "_buffers", "_modules"):
            table = state.get(kind) or {}
            if not isinstance(table, dict) or not isinstance(passing, (set, frozenset)):
                raise Refused(f"{kind} of {module.name} is no dictionary")
            for key, value in table.items():
                inner = _join(name, key)
                if value is None or (kind == "_buffers" and key in passing):
                    continue
                if kind == "_modules" and isinstance(value, Holder):
                    self.module(inner, value, depth + 1)
                elif kind != "_modules" and isinstance(value, Tensor):
                    self.visit(depth)
                    self.add(inner, value)
                else:
                    raise Refused(f"{shown(inner)} is no {'module' if kind == '_modules' else 'tensor'}")

    def add(self, name: str, tensor: Tensor) -> None:
        self.room -= tensor.array.nbytes
        if self.room < 0 or name in self.tensors:
            raise Refused(f"tensor {shown(name)} appears more than once" if self.room >= 0 else "its tensors overlap")
        self.tensors[name] = tensor

    def about(self, value: Holder, depth: int) -> dict[str, Any]:
        """Class, checksum of its source, arguments and plain attributes of an object."""
        known = {k: v for k, v in value.state.items() if isinstance(k, str)}
        out = {"class": shown(value.name.split(".")[-1]), "source_sha256": value.source}
        for key in ("_init_args", "_init_kwargs"):
            out[key[1:]] = self.plain(known.get(key), depth + 1)
        out["state"] = {shown(k): self.plain(v, depth + 1) for k, v in known.items() if not k.startswith("_")}
        return out

    def plain(self, value: Any, depth: int) -> Any:
        self.visit(depth)
        value = value.tensor if isinstance(value, Array) else value
        if isinstance(value, Tensor):
            few = value.dtype in NUMPY.values() and value.array.size <= 64
            return self.plain(value.array.tolist(), depth + 1) if few else f"{value.dtype} {value.array.shape}"
        if isinstance(value, Holder):
            return {"class": shown(value.name.split(".")[-1])}
        if isinstance(value, dict):
            return {shown(k): self.plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(v, depth + 1) for v in value]
        if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else str(value)
        return value[:1000] if isinstance(value, str) else type(value).__name__


def _join(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key or len(key) > 200 or not key.isprintable():
        raise Refused(f"{shown(key)} is no name of a tensor")
    return f"{name}.{key}" if name else key


def read(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], Any]:
    """A pickle's tensors by dotted name, and its plain data: classes, arguments, numbers. Raises Refused."""
    walk = _Walk(size)
    about = walk.tree("", parse(file, size))
    return walk.tensors, about


def write(tensors: dict[str, Tensor], path: str) -> None:
    """A safetensors file, tensor by tensor, without a second copy of all of them."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
