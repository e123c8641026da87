"""Pickles that no checkpoint is: each tries to run something, to take memory or time, or is damaged. Written opcode by opcode."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile

import torch

from tests.convert import pickled

P2, P4 = b"\x80\x02", b"\x80\x04"


def text(s: str) -> bytes:
    """A string on the stack."""
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def data(b: bytes) -> bytes:
    """Bytes on the stack."""
    return b"B" + struct.pack("<I", len(b)) + b


def number(n: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", n)


def named(name: str) -> bytes:
    """GLOBAL of a dotted name."""
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def stacked(module: str, name: str) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(name) + b"\x93"


def called(name: str, *arguments: bytes) -> bytes:
    """name(*arguments) by REDUCE, on the stack."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def file(body: bytes) -> bytes:
    return P2 + body + b"."


def storage(values: torch.Tensor) -> bytes:
    """The bytes that torch stores for a storage in such files."""
    out = io.BytesIO()
    typed = torch.storage.TypedStorage(wrap_storage=values.untyped_storage(), dtype=values.dtype, _internal=True)
    torch.save(typed, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def tensor(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A tensor of a storage of `count` zeros."""
    held = called("torch.storage._load_from_bytes", data(storage(torch.zeros(count))))
    shape = lambda t: b"(" + b"".join(map(number, t)) + b"t"
    return called("torch._utils._rebuild_tensor_v2", held, number(offset), shape(size), shape(stride), b"\x89", b"}")


def cases(canary: str) -> dict[str, bytes]:
    """Name -> pickle. `canary`: the file whose existence would show that something was run."""
    shell, code = f"touch {canary}", f"open({canary!r}, 'w')"
    out: dict[str, bytes] = {}
    runs = {
        "os.system": shell, "posix.system": shell, "os.popen": shell, "subprocess.call": shell, "subprocess.Popen": shell,
        "subprocess.getoutput": shell, "pty.spawn": shell, "builtins.eval": code, "builtins.exec": code,
        "__builtin__.eval": code, "builtins.__import__": "antigravity", "builtins.open": canary, "io.open": canary,
        "builtins.getattr": "x", "builtins.compile": code, "builtins.print": "x", "builtins.input": "x",
        "importlib.import_module": "antigravity", "runpy.run_path": canary, "runpy._run_code": code,
        "webbrowser.open": "file:///", "socket.create_connection": "x", "urllib.request.urlopen": "http://127.0.0.1",
        "ctypes.CDLL": "x.so", "marshal.loads": "x", "types.FunctionType": "x", "functools.partial": "x",
        "operator.attrgetter": "system", "operator.methodcaller": "system", "pickle.loads": "x", "_pickle.loads": "x",
        "torch.load": canary, "torch.serialization.load": canary, "torch.hub.load": "x", "torch.jit.load": "x",
        "numpy.load": canary, "numpy.testing._private.utils.runstring": code, "timeit.timeit": code, "cProfile.run": code,
        "bdb.Bdb.run": code, "pdb.run": code, "code.interact": "x", "shutil.rmtree": canary, "os.remove": canary,
        "sys.exit": "x", "logging.config.fileConfig": canary, "copyreg.add_extension": "os", "sys.addaudithook": "x",
        "torch_utils.persistence._src_to_module": code, "dnnlib.util.call_func_by_name": "os.system",
        "torch.nn.modules.module.os": shell, "torch.nn.modules.conv._load": shell, "_codecs.decode": "x",
        "builtins.bytearray": "x", "weakref.finalize": "x", "atexit.register": "x", "torch._dynamo.optimize": "x",
    }  # fmt: skip
    for name, argument in runs.items():
        out[f"calls {name}"] = file(called(name, text(argument)))
    system = text(shell)
    out["stack global"] = P4 + stacked("os", "system") + b"(" + system + b"tR."
    out["stack global, dotted"] = P4 + stacked("collections", "OrderedDict.__init__.__globals__") + b"."
    out["stack global, dotted layer"] = P4 + stacked("torch.nn.modules.module", "Module.register.__globals__") + b"."
    out["stack global of no text"] = P4 + number(1) + number(2) + b"\x93."
    out["inst"] = file(b"(" + system + b"ios\nsystem\n")
    out["obj"] = file(b"(" + named("os.system") + system + b"o")
    out["newobj"] = file(named("subprocess.Popen") + b"(" + system + b"t\x81")
    out["newobj_ex"] = P4 + named("subprocess.Popen") + b"(" + system + b"t}\x92."
    out["newobj of a layer with arguments"] = file(named("torch.nn.modules.conv.Conv2d") + b"(" + system + b"t\x81")
    for i, extension in enumerate((b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00")):
        out[f"ext{2**i}"] = file(extension)
    out["persid"] = file(b"Pos.system\n")
    out["binpersid"] = file(text("os.system") + b"Q")
    out["next buffer"] = b"\x80\x05\x97."
    out["readonly buffer"] = b"\x80\x05\x97\x98."
    state = lambda k, v: b"}" + text(k) + v + b"s"
    out["build a constructor"] = file(
        named("collections.OrderedDict") + state("make", named("collections.OrderedDict")) + b"b"
    )
    out["build by slots"] = file(named("builtins.set") + b"(N" + state("make", text("x")) + b"tb")
    out["build a class"] = file(named("dnnlib.util.EasyDict") + state("__setstate__", text("x")) + b"b")
    out["build a layer's class"] = file(named("torch.nn.modules.conv.Conv2d") + state("name", text("x")) + b"b")
    out["build a dictionary"] = file(named("dnnlib.util.EasyDict") + b")\x81" + state("__class__", text("x")) + b"b")
    out["build a layer twice"] = file(
        named("torch.nn.modules.conv.Conv2d") + b")\x81" + state("a", text("x")) + b"b" + state("b", text("x")) + b"b"
    )
    out["build a layer from a list"] = file(named("torch.nn.modules.conv.Conv2d") + b")\x81]b")
    array = called("numpy._core.multiarray._reconstruct", named("numpy.ndarray"), b"(K\x00t", data(b"b"))
    dtype = lambda code: called("numpy.dtype", text(code), b"\x89", b"\x88")
    out["array of objects"] = file(array + b"(K\x01(K\x01t" + dtype("O") + b"\x89]" + named("os.system") + b"atb")
    out["array of records"] = file(dtype("V8"))
    wide = b"(K\x01(" + number(2**40) + b"t" + dtype("f4") + b"\x89" + data(b"abcd") + b"tb"
    out["array larger than its bytes"] = file(array + wide)
    out["ndarray called"] = file(called("numpy.ndarray", b"(" + number(2**40) + b"t"))
    out["encode to rot13"] = file(called("_codecs.encode", text("x"), text("rot13")))
    load = "torch.storage._load_from_bytes"
    out["pickle in a storage"] = file(called(load, data(file(called("os.system", system)))))
    out["pickle after a storage's magic"] = file(
        called(load, data(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + file(called("os.system", system)) * 4))
    )
    zipped, tarred = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2), zipped)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../storages"))
    out["zip in a storage"] = file(called(load, data(zipped.getvalue())))
    out["tar in a storage"] = file(called(load, data(tarred.getvalue())))
    sound = storage(torch.zeros(8))
    out["storage cut short"] = file(called(load, data(sound[:-4])))
    out["storage with more behind it"] = file(called(load, data(sound + b"1234")))
    out["storage of 2^62 numbers"] = file(called(load, data(sound[:-40] + struct.pack("<q", 2**62) + sound[-32:])))
    out["storage of no bytes"] = file(called(load, text("x")))
    out["tensor past its storage"] = file(tensor(8, 7, (4,), (1,)))
    out["tensor before its storage"] = file(tensor(8, -2, (4,), (1,)))
    out["tensor by negative strides"] = file(tensor(8, 0, (4,), (-1,)))
    out["tensor of 2^40 numbers by strides of 0"] = file(tensor(8, 0, (2**20, 2**20), (0, 0)))
    out["tensor of no storage"] = file(
        called("torch._utils._rebuild_tensor_v2", text("x"), number(0), b")", b")", b"\x89", b"}")
    )
    out["parameter of no tensor"] = file(called("torch._utils._rebuild_parameter", text("x"), b"\x89", b"}"))
    persistent = "torch_utils.persistence._reconstruct_persistent_obj"
    out["persistent object without a name"] = file(called(persistent, state("module_src", text(code))))
    out["persistent object of a function"] = file(called(persistent, text("x")))
    out["set of tuples"] = file(called("builtins.set", b"]" + b"(K\x01K\x02t" + b"a"))
    out["ordered dictionary of a number"] = file(called("collections.OrderedDict", b"K\x05"))
    pairs = lambda **items: b"}" + b"".join(text(k) + v + b"s" for k, v in items.items())
    layer = lambda body: file(called(persistent, pairs(type=text("class"), class_name=text("N"), state=body)))
    out["modules that are a list"] = layer(state("_modules", b"]" + text("x") + b"a"))
    out["module that is text"] = layer(state("_modules", state("a", text("x"))))
    out["parameter that is text"] = layer(
        b"}" + text("_modules") + b"}s" + text("_parameters") + state("a", text("x")) + b"s"
    )
    out["name of a tensor with an escape"] = layer(pairs(_modules=b"}", _parameters=state("\x1b[2J", text("x"))))
    out["name that is a number"] = file(b"}K\x01K\x02s")
    out["dictionary with a list as key"] = file(b"}]K\x02s")
    conv = named("torch.nn.modules.conv.Conv2d") + b")\x81"
    out["module that holds itself"] = layer(b"}q\x01" + text("_modules") + b"}" + text("a") + conv + b"h\x01bss")
    out["dictionary that holds itself"] = file(b"}q\x01" + text("a") + b"h\x01s")
    lists = b"]q\x00" + b"".join(b"]q" + bytes([i]) + (b"h" + bytes([i - 1]) + b"a") * 8 for i in range(1, 60))
    out["memo bomb of lists"] = file(lists)
    out["lists 100,000 deep"] = file(b"]" * 100_000 + b"a" * 99_999)
    out["memo entry of 2^31"] = file(b"Nr" + struct.pack("<I", 2**31 - 1))
    out["frame of 2^62"] = P4 + b"\x95" + struct.pack("<Q", 2**62) + b"N."
    out["bytes of 2^62"] = P4 + b"\x8e" + struct.pack("<Q", 2**62) + b"x."
    out["text of 2^62"] = P4 + b"\x8d" + struct.pack("<Q", 2**62) + b"x."
    out["bytearray of 2^40"] = b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x."
    out["number of negative length"] = file(b"\x8b\xff\xff\xff\xff")
    out["text numbers"] = file(b"I1\n")
    out["text string"] = file(b"S'x'\n")
    out["no protocol"] = b"}."
    out["protocol 9"] = b"\x80\x09}."
    out["protocol twice"] = P2 + P2 + b"}."
    out["no stop"] = P2 + b"}"
    out["stop alone"] = P2 + b"."
    out["mark left open"] = P2 + b"(((."
    out["append to nothing"] = file(b"a")
    out["append to a layer"] = file(named("torch.nn.modules.conv.Conv2d") + b")\x81Na")
    out["memo entry never set"] = file(b"h\x09")
    out["call of text"] = file(text("x") + b")R")
    out["unknown opcode"] = P2 + b"\xff."
    net = pickled.dumps({"ema": pickled.Precond()})
    out["a snapshot with bytes behind it"] = net + b"x"
    out["a snapshot and a second pickle"] = net + file(called("os.system", system))
    for part in (0.1, 0.5, 0.9, 0.999):
        out[f"a snapshot cut at {part}"] = net[: int(len(net) * part)]
    layer_name, other = b"torch.nn.modules.linear\x94\x8c\x06Linear", b"os_nothing_such_thing..\x94\x8c\x06system"
    out["a snapshot whose layer is another"] = net.replace(layer_name, other)
    assert out["a snapshot whose layer is another"] != net
    return out


def hash_bomb() -> bytes:
    """A key of nested pairs whose hash takes 2^60 steps: only a limit on time stops it."""
    return file(b"}K\x01" + b"2\x86" * 60 + b"Ns")
