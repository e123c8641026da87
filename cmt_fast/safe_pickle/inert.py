"""What stands in the place of every constructor that a pickled checkpoint names: it keeps what it is given, and runs nothing.

A name that is not in CONSTRUCTORS (or a layer of torch) is refused. A storage is parsed from its bytes: the stock constructor
would be a `torch.load` of whatever is inside.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from typing import Any, NamedTuple

import numpy as np

from cmt_fast.safe_pickle.opcodes import OPCODES, Refused, scan, shown

# torch's storages: the name of their dtype in safetensors and how NumPy views their bytes (it has no bfloat16)
STORAGES = {
    "FloatStorage": ("F32", "<f4"),
    "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"),
    "DoubleStorage": ("F64", "<f8"),
    "LongStorage": ("I64", "<i8"),
    "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"),
    "CharStorage": ("I8", "<i1"),
    "ByteStorage": ("U8", "<u1"),
    "BoolStorage": ("BOOL", "?"),
}
NUMPY = {
    "f4": "F32",
    "f2": "F16",
    "f8": "F64",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "b1": "BOOL",
}


class Holder:
    """Stands for an object of a class that is not loaded: the class's name, its state and its source's checksum."""

    __slots__ = ("state", "source")
    name = "object"

    def __new__(cls, *arguments):
        if arguments:
            raise Refused(f"{cls.name} is built with arguments")
        self = super().__new__(cls)
        self.state, self.source = {}, None
        return self

    def __setstate__(self, state) -> None:
        if not isinstance(state, dict) or self.state:
            raise Refused(f"the state of {self.name} is no dictionary")
        self.state = state


class Maker:
    """A function of this page in the place of a constructor; it has no attribute that a pickle could set."""

    __slots__ = ("make",)

    def __init__(self, make) -> None:
        self.make = make

    def __call__(self, *arguments):
        return self.make(*arguments)

    def __setstate__(self, state) -> None:
        raise Refused("sets the state of a constructor")


class EasyDict(dict):
    """dnnlib's dictionary with attributes, without the attributes."""

    __slots__ = ()

    def __setstate__(self, state) -> None:
        raise Refused("sets the state of a dictionary")


class Tensor(NamedTuple):
    """A tensor's values as an array over its storage; dtype: its name in safetensors."""

    dtype: str
    array: np.ndarray


class Storage(NamedTuple):
    """The bytes of one torch storage."""

    dtype: str
    view: str
    data: memoryview


class Dtype:
    """A NumPy dtype by its code, numbers only."""

    __slots__ = ("code", "order")

    def __init__(self, code, align=False, copy=False) -> None:
        if not isinstance(code, str) or code.lstrip("<|=") not in NUMPY:
            raise Refused(f"an array of dtype {shown(code)}")
        self.code, self.order = code.lstrip("<|="), "<"

    def __setstate__(self, state) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", "|", "=")):
            raise Refused("an array's dtype is not little-endian")

    def read(self, data, shape, order: str) -> Tensor:
        """data: bytes of an array of `shape`, in C or Fortran order."""
        if not isinstance(data, (bytes, bytearray)):
            raise Refused("an array's data are no bytes")
        return Tensor(NUMPY[self.code], np.frombuffer(data, "<" + self.code).reshape(_sizes(shape), order=order))


class Array:
    """A NumPy array under construction: `_reconstruct`, then its state."""

    __slots__ = ("tensor",)

    def __init__(self, kind, shape, code) -> None:
        self.tensor = None

    def __setstate__(self, state) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], Dtype)):
            raise Refused("an array's state is not that of an array of numbers")
        self.tensor = state[2].read(state[4], state[1], "F" if state[3] else "C")


def _sizes(shape) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise Refused(f"an array's shape is {shown(shape)}")
    return shape


def _ordered(pairs=()) -> dict:
    if not isinstance(pairs, (list, tuple)):
        raise Refused("an OrderedDict is built from something else than pairs")
    return dict(pairs)


def _strings(items=()) -> set:
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, int)) for i in items):
        raise Refused("a set of something else than names")
    return set(items)


def _encode(text, encoding="utf-8") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"_codecs.encode to {shown(encoding)}")
    return text.encode("latin1")


def _scalar(dtype, data=None):
    if not isinstance(dtype, Dtype):
        raise Refused("a NumPy scalar of no dtype")
    return dtype.read(data, (), "C").array.item()


def _frombuffer(data, dtype, shape, order) -> Tensor:
    if not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise Refused("an array's buffer is not one of numbers")
    return dtype.read(data, shape, order)


def _tensor(storage, offset, size, stride, *rest) -> Tensor:
    """torch's _rebuild_tensor_v2: a strided view that must lie in its storage, no larger than it."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise Refused("a tensor has no storage")
    size, stride = _sizes(size), _sizes(stride)
    item = np.dtype(storage.view).itemsize
    if len(size) != len(stride) or math.prod(size) * item > len(storage.data):
        raise Refused(f"a tensor of {size} is larger than its storage")
    if not len(storage.data):
        return Tensor(storage.dtype, np.empty(size, storage.view))
    strides = tuple(s * item for s in stride)
    return Tensor(storage.dtype, np.ndarray(size, storage.view, storage.data, offset * item, strides))


def _parameter(data, requires_grad=None, hooks=None, *state) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter is no tensor")
    return data


def _persistent(meta) -> Holder:
    """torch_utils.persistence: keeps the class's name, its state and the checksum of its source, which stays text."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str) or meta.get("type") != "class":
        raise Refused("a persistent object without a class name")
    held = holder_class(f"persistence.{meta['class_name']}")()
    held.__setstate__(meta.get("state") or {})
    held.source = hashlib.sha256(str(meta.get("module_src")).encode("utf-8", "replace")).hexdigest()
    return held


def holder_class(name: str) -> type:
    return type("Holder", (Holder,), {"__slots__": (), "name": name})


def _storage(data) -> Storage:
    """torch.storage._load_from_bytes: torch's old file of one storage, parsed: five small pickles, a length, the bytes."""
    if not isinstance(data, bytes):
        raise Refused("a storage of no bytes")
    file = io.BytesIO(data)
    magic, protocol, system, record, keys = (_small(file, data) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or protocol != 1001:
        raise Refused("a storage is not in torch's old format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a storage is not little-endian")
    if not isinstance(record, _Record) or keys != [record.key]:
        raise Refused("a storage file holds something else than one storage")
    dtype, view = STORAGES[record.kind]
    start = file.tell() + 8
    count, item = int.from_bytes(data[start - 8 : start], "little"), np.dtype(view).itemsize
    if count != record.count or len(data) - start != count * item:
        raise Refused(f"a storage of {shown(record.count)} numbers has {len(data) - start} bytes")
    return Storage(dtype, view, memoryview(data)[start:])


class _Record(NamedTuple):
    kind: str
    key: str
    count: int


class _StorageKind(NamedTuple):
    name: str


class _StorageUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageKind(name)
        raise Refused(f"a storage names {shown(module)}.{shown(name)}, which no storage does")

    def persistent_load(self, pid):
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage" and isinstance(pid[1], _StorageKind)):
            raise Refused("a storage's record is not one")
        if type(pid[4]) is not int or not isinstance(pid[2], str) or pid[5] is not None:
            raise Refused("a storage is a view of another, which these files do not hold")
        return _Record(pid[1].name, pid[2], pid[4])


def _small(file: io.BytesIO, data: bytes):
    start = file.tell()
    scan(file, len(data), OPCODES | {"BINPERSID"}, 1000)
    return _StorageUnpickler(io.BytesIO(data[start : file.tell()])).load()


def _ndarray(*_):
    raise Refused("numpy.ndarray is called")


CONSTRUCTORS: dict[str, Any] = {
    "collections.OrderedDict": Maker(_ordered),
    "builtins.set": Maker(_strings),
    "__builtin__.set": Maker(_strings),
    "_codecs.encode": Maker(_encode),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch.storage._load_from_bytes": Maker(_storage),
    "torch.Size": Maker(lambda sizes=(): _sizes(tuple(sizes))),
    "torch_utils.persistence._reconstruct_persistent_obj": Maker(_persistent),
    "dnnlib.EasyDict": EasyDict,
    "dnnlib.util.EasyDict": EasyDict,
    "numpy.ndarray": Maker(_ndarray),
    "numpy.dtype": Maker(Dtype),
    **{f"numpy.{core}.multiarray._reconstruct": Maker(Array) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": Maker(_scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Maker(_frombuffer) for core in ("core", "_core")},
}
