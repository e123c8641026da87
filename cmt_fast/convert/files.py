"""Other projects' checkpoint files as named tensors: pickles (sandbox.py), torch's `.pt`, safetensors.

What a file is, is read off its structure, not its name. `.pt` files are read by `torch.load(weights_only=True)` over a
memory map, after their archive and opcodes were looked at; the one class beside tensors and plain data that training scripts
store, argparse.Namespace, is replaced by an inert one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.data.arrays import is_zip
from cmt_fast.safe_pickle import sandbox
from cmt_fast.safe_pickle.opcodes import OPCODES, Refused, scan, shown

# names under which files keep several versions of a network, the wanted one first
PREFERRED = ("ema", "ema_model", "model_ema", "G_ema", "net", "model", "state_dict", "module")
AVERAGED = PREFERRED[:4]
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch began files with before 1.6, as a pickle
ZIP = b"PK\x03\x04"
HEADER_BYTES = 100_000_000  # the longest header that safetensors has
POINTER = b"version https://git-lfs.github.com/"


class Source(NamedTuple):
    """One network of a file. entry: which of `entries` it is, "" where the file holds one; about: what else is known of it.

    about: "class" and "init_kwargs" of a pickled network, "encoder" of its snapshot, "args" of a training script's file (the
    namespace, or a nested config with dots in its keys), "metadata" of safetensors. notes: sentences for the reader. Tensors
    of safetensors and `.pt` files are a memory map: until their numbers are looked at, only headers were read.
    """

    path: Path
    kind: str
    entry: str
    entries: tuple[str, ...]
    tensors: dict[str, Tensor]
    about: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """sha256 of the file's bytes, all of which are read for it, once."""
        return sha256(self.path)


def read(path: Path, entry: str | None = None) -> Source:
    """The network `entry` (by default the EMA, where there is one) of a checkpoint file.

    Raises ConfigError, one line that names the file, for what is damaged, hostile, or no checkpoint.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise ConfigError(f"FILE: {str(path)!r} cannot be read (it is no file)")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConfigError(f"FILE: {str(path)!r} cannot be read ({error.strerror})") from None
    kind = _kind(head)
    if kind is None:
        raise ConfigError(f"FILE: {str(path)!r} is {_else(head)}")
    reader = {"torch": _torch, "pickle": _pickle, "safetensors": _safetensors}[kind]
    try:
        networks, about = reader(path)
    except Refused as refused:
        raise ConfigError(f"FILE: {str(path)!r} is refused: {refused}") from None
    name = _pick(path, networks, entry)
    tensors, notes = _unwrapped(networks[name])
    if entry is None and name not in ("", *AVERAGED):
        notes += (
            f"the file has no EMA; its entry {shown(name)!r} is taken, whose weights may be those of the last step",
        )
    about = {**about, **about.pop("networks", {}).get(name, {})}
    return Source(path, kind, name, tuple(networks), tensors, about, notes)


def _kind(head: bytes) -> str | None:
    """What begins with these bytes: safetensors (8 bytes of header length, little endian, then its JSON), torch or pickle.

    A header's length may begin with any byte, those of a pickle or of an archive too; neither has a small number and a brace
    there: the sixth to eighth bytes of a pickle that are zero belong to a frame, whose length does not end in a brace.
    """
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_BYTES:
        return "safetensors"
    if head.startswith(ZIP) or (head[:1] == b"\x80" and LEGACY in head):
        return "torch"
    return "pickle" if head[:1] == b"\x80" else None


def _else(head: bytes) -> str:
    """What a file is that is no checkpoint, in words for its reader."""
    if head.startswith(POINTER):
        return "a pointer of Git LFS and not the file it stands for; fetch that with `git lfs pull`, or download it"
    if head.lstrip()[:1] == b"<":
        return "a web page and no checkpoint; the download was answered with text, open its address in a browser"
    return "no checkpoint; valid are .safetensors, .pt, and pickles of EDM and EDM2"


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(8)
def _sha256(path: Path, size: int, time: int) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _pick(path: Path, networks: dict[str, Any], wanted: str | None) -> str:
    """The entry asked for, or the first of those that are usual."""
    if not networks:
        raise ConfigError(f"FILE: {str(path)!r} holds no network, that is, no tensors by name")
    names = [shown(n) for n in networks]
    if wanted is not None:
        if wanted not in networks:
            raise ConfigError(
                f"--ema: {wanted!r} is not in the file; it has {', '.join(names)}{nearest(wanted, names)}"
            )
        return wanted
    found = next((n for n in PREFERRED if n in networks), next(iter(networks)) if len(networks) == 1 else None)
    if found is None:
        raise ConfigError(f"--ema: is missing; the file has {', '.join(names)}, name one of them")
    return found


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Without a prefix that every name has, and the sentence that says so."""
    notes = []
    while prefix := next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), None):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
        notes.append(f"every name began with {prefix!r}, which is left out")
    return tensors, tuple(notes)


# ---------------------------------------------------------------------------------------------- the three kinds


def _pickle(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="cmt-import-") as folder:
        about = sandbox.read(path, Path(folder))
        tensors = load_file(Path(folder) / sandbox.RESULTS[0])
    if isinstance(about, dict) and "source_sha256" in about:
        return {"": tensors} if tensors else {}, {"networks": {"": about}}
    parts = about if isinstance(about, dict) else {}
    known = {k: v for k, v in parts.items() if isinstance(v, dict) and "source_sha256" in v}
    networks = {k: _under(k, tensors) for k in known}
    about = {"encoder": known.get("encoder"), "networks": {k: v for k, v in known.items() if networks[k]}}
    return {k: v for k, v in networks.items() if v and k != "augment_pipe"}, about


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


class _Inert:
    """Stands for argparse.Namespace: keeps its plain attributes."""

    def __new__(cls, *arguments, **named):
        return super().__new__(cls)

    def __setstate__(self, state) -> None:
        self.state = state if isinstance(state, dict) else {}


def _torch(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    zipped = is_zip(path)
    if zipped:
        _archive(path)
    elif (protocol := _protocol(path)) > 3:
        raise Refused(
            f"torch's form of before 1.6 with pickle protocol {protocol}, which is not read; torch.save it anew"
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, "argparse.Namespace")]):
            warnings.simplefilter("ignore")  # protocol 3 is read well, and warned of
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises nearly every kind for a damaged file
        text = str(error)
        if named := re.search(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL|Unsupported class) ([\w.]+\w)", text):
            raise Refused(f"it names {shown(named[1])}, and only tensors and plain data are read") from None
        raise Refused(
            f"it is damaged ({type(error).__name__}: {shown(text.splitlines()[0] if text else '', 160)})"
        ) from None
    if not isinstance(tree, Mapping):
        raise Refused(f"it holds a {type(tree).__name__}, not tensors by name")
    networks = {k: _tensors(v) for k, v in tree.items() if isinstance(k, str) and isinstance(v, Mapping)}
    networks = {k: v for k, v in networks.items() if v}
    if own := _tensors(tree):
        networks = {"": own}
    args = tree.get("args", tree.get("config"))
    return networks, {"args": _plain(args.state if isinstance(args, _Inert) else args)}


def _protocol(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(2)
    return head[1] if head[:1] == b"\x80" and len(head) == 2 else 0


def _plain(args: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """The plain values of a training script's arguments; those of a dictionary in it under `outer.inner`."""
    known: dict[str, Any] = {}
    for key, value in args.items() if isinstance(args, Mapping) else ():
        name = prefix + shown(key)
        if isinstance(value, Mapping) and depth < 3:
            known |= _plain(value, f"{name}.", depth + 1)
        elif value is None or isinstance(value, (str, int, float, bool)):
            known[name] = value
    return known


def _tensors(tree: Mapping) -> dict[str, Tensor]:
    """The tensors of a mapping. Raises Refused for one that is not plain numbers, all of them in the file."""
    found = {k: v.detach() for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for name, x in found.items():
        plain = x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
        if not plain or x.numel() * x.itemsize > x.untyped_storage().nbytes():
            raise Refused(f"{shown(name)} is no plain tensor of numbers that are in the file")
    return found


def _archive(path: Path) -> None:
    """Raises Refused for an archive that torch does not write: members packed, twice, elsewhere, or hostile opcodes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [m.filename for m in members]
            if len(set(names)) != len(names):
                raise Refused("its archive holds one name twice")
            for m in members:
                if m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size:
                    raise Refused(f"{shown(m.filename)} is compressed, which torch does not do")
                if m.filename.startswith("/") or ".." in m.filename.split("/") or "\\" in m.filename:
                    raise Refused(f"{shown(m.filename)} lies outside the archive")
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise Refused("its members are larger than the file")
            trees = [m for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
            if len(trees) != 1:
                raise Refused("it is an archive, but not one of torch, which has one data.pkl")
            with archive.open(trees[0]) as file:
                scan(file, trees[0].file_size, OPCODES | {"BINPERSID"})
    except Refused:
        raise
    except Exception as error:  # zipfile and pickletools raise nearly every kind for a damaged file
        raise Refused(f"it is damaged ({type(error).__name__}: {shown(str(error))})") from None


def _safetensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except Exception as error:  # SafetensorError, and what the file system says
        raise Refused(f"it is damaged ({shown(str(error), 160)})") from None
    about: dict[str, Any] = {"metadata": metadata}
    try:
        about["cmt"] = json.loads(metadata["cmt-fast"]) if "cmt-fast" in metadata else None
    except (ValueError, RecursionError):
        raise Refused("its own description is damaged") from None
    if not isinstance(about["cmt"], (dict, type(None))) or not isinstance((about["cmt"] or {}).get("run", {}), dict):
        raise Refused("its own description is damaged")
    return {"": tensors} if tensors else {}, about
