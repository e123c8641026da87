"""Checkpoints: safetensors and a manifest with checksums, no pickle, visible only when complete.

    STAGE/checkpoints/step-00001200/  manifest.json  model.safetensors  ema-0.safetensors  optimizer.safetensors

Written to a temporary folder, every file synced, then renamed: a folder with its final name is whole, or
its checksums say that it is not, and the one before it is used. It is believed only where it lies: a manifest of another
step than its folder's name, or of another stage, is passed over. Files hold full tensors by name whatever engine and
number of processes wrote them, and are written and read tensor by tensor, hashed on the way (tensor_file.py). Who needs the
manifest alone looks at sizes; a file is hashed when its tensors are read, once a process.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cmt_fast.storage import locks, sound, tensor_file
from cmt_fast.storage.files import (
    DiskFull,
    free,
    is_full,
    move_folder,
    save_tensors,
    sync,
    write_text,
)  # fmt: skip
from cmt_fast.storage.sound import CheckpointError, Unsound, canonical, signed
from cmt_fast.storage.tensor_file import Damaged, Reader, Tensors, checksum

if TYPE_CHECKING:  # torch comes with the first tensor: who lists runs reads manifests alone
    from torch import Tensor

FORMAT = 1
HEAD, ENTRY = 4096, 96  # bytes of a file beside its tensors, with its line in the manifest; of a tensor in its header
GOES_ON = "training cannot go on from it, what is finished can be sampled and judged"
NO_WEIGHTS = "nothing can be sampled or trained from it"
CONSEQUENCES = {"model": GOES_ON, "optimizer": GOES_ON}
_passed_over = set[str]()  # what this process has said of checkpoints


class Checkpoint(NamedTuple):
    """A checkpoint on disk. manifest: step, nimg, stage, config hash, lineage, file checksums; its files have their sizes."""

    folder: Path
    manifest: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The named tensors of one file ("model", "ema-0", "optimizer"), verified. Raises CheckpointError, as Damaged where
        they are not what was written."""
        return dict(self.stream(name).items())

    def stream(self, name: str) -> Tensors:
        """The same, read tensor by tensor as they are asked for; in the file's order its bytes are read and hashed once.

        Raises CheckpointError, for a name it lacks too, and Damaged with the last tensor: until all have come none is to be
        relied on.
        """
        path = self._file(name)
        reader = Reader(path, self.manifest["files"][path.name])
        return Tensors(reader.shapes, reader.fetch, reader.rest)

    def _file(self, name: str) -> Path:
        path = self.folder / f"{name}.safetensors"
        if path.name not in self.manifest["files"]:
            if path.name in self.manifest.get("pruned", {}):
                raise CheckpointError(f"{self.folder}: {removed(name)}; {CONSEQUENCES.get(name, NO_WEIGHTS)}")
            raise CheckpointError(f"{self.folder}: holds no {name}; it has {', '.join(self.manifest['files'])}")
        return path


def folder_of(stage_dir: Path, step: int) -> Path:
    return stage_dir / "checkpoints" / f"step-{step:08d}"


def save(
    stage_dir: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    about: dict[str, Any],
    keep: int = 2,
    write: bool = True,
) -> Path:
    """Write one checkpoint and prune all but the newest `keep` that are whole. Returns its folder; raises DiskFull where it
    does not fit, OSError where the disk refuses otherwise: then what was there is there, and nothing else.

    On several ranks all call it, one of them with `write`: the others only take part in fetching sharded tensors.
    """
    pending = _pull(files)
    try:
        return _save(stage_dir, step, files, pending, about, keep) if write else folder_of(stage_dir, step)
    finally:
        for _ in pending:  # a disk that refuses must not leave the other ranks waiting for a fetch
            pass


def _pull(files: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """Every tensor that is fetched, in the order in which it is written."""
    for tensors in files.values():
        if isinstance(tensors, Tensors):
            yield from (tensors[name] for name in sorted(tensors))


def size(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes that a checkpoint of these takes: of its tensors, and about those of headers and manifest."""
    out = len(files) * HEAD
    for tensors in files.values():
        if isinstance(tensors, Tensors):
            out += sum(4 * math.prod(shape) + ENTRY + len(name) for name, shape in tensors.shapes.items())
        else:
            out += sum(t.numel() * t.element_size() + ENTRY + len(name) for name, t in tensors.items())
    return out


def _save(
    stage_dir: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    pending: Iterator[Tensor],
    about: dict[str, Any],
    keep: int,
) -> Path:
    final = folder_of(stage_dir, step)
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    needed = size(files)
    room = free(final.parent)
    if room is not None and room < needed:
        raise DiskFull(final, needed, room)
    try:
        temporary.mkdir(parents=True)
        sums = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            if isinstance(tensors, Tensors):
                sums[path.name] = tensor_file.write(path, tensors.shapes, pending)._asdict()
            else:
                save_tensors(path, tensors)
                sums[path.name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
            sync(path)
        body = {"format": FORMAT, "step": step, **about, "files": sums}
        write_text(temporary / "manifest.json", signed(body))
        sync(temporary)
        locks.check(stage_dir)
        if final.exists():
            _discard(final)
        move_folder(temporary, final, "manifest.json")
        sync(final.parent)
    except OSError as error:
        if not is_full(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)  # before what is free is counted
        raise DiskFull(error.filename or final, needed, free(final.parent) or 0, error.errno or 0) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _retain(stage_dir, step, keep)
    return final


def _retain(stage_dir: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` that are whole by their sizes. Raises OSError where the one of `step`, just
    written, is not: then nothing is deleted."""
    try:
        found = [n for n in steps(stage_dir) if n <= step]  # those of later steps were passed over as damaged
    except Unsound:  # they cannot be listed now: none is deleted
        return
    if len(found) <= keep:
        return
    whole = 0
    for i, old in enumerate(reversed(found)):
        try:
            sized(folder_of(stage_dir, old))
            whole += 1
        except CheckpointError as error:
            if old == step:
                raise OSError(errno.EIO, f"what was written is not there ({error})", str(error)) from None
        if whole == keep:
            for n in found[: len(found) - 1 - i]:
                _discard(folder_of(stage_dir, n))
            return


def _discard(folder: Path) -> None:
    """Delete a checkpoint, under a name that debris.py knows: a kill meanwhile leaves none that is half there. Where folders are
    not renamed its manifest goes first, without which it is none. Raises nothing."""
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}-old")
    try:
        os.replace(folder, aside)
    except OSError:
        aside = folder
        with contextlib.suppress(OSError):
            (folder / "manifest.json").unlink()
    shutil.rmtree(aside, ignore_errors=True)


def steps(stage_dir: Path) -> list[int]:
    """Steps of the checkpoints that stand under their final names, oldest first.

    Raises Unsound where they cannot be listed: a stage whose checkpoints cannot be seen has not none.
    """
    names = _names(stage_dir)
    return sorted(int(n[5:]) for n in names if n[5:].isascii() and n[5:].isdigit() and n == f"step-{int(n[5:]):08d}")


def strays(stage_dir: Path) -> list[Path]:
    """What is called like a checkpoint, and not as this version calls one: it was renamed, and is not read."""
    known = {folder_of(stage_dir, step).name for step in steps(stage_dir)}
    return [stage_dir / "checkpoints" / n for n in sorted(_names(stage_dir)) if n not in known]


def _names(stage_dir: Path) -> list[str]:
    folder = stage_dir / "checkpoints"
    try:
        return [name for name in os.listdir(folder) if name.startswith("step-")]
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise Unsound(folder, "is a link to nothing, not the folder of the checkpoints") from None
        return []
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not os.path.lexists(folder):
            return []  # the stage is a file: it says so itself
        raise Unsound(folder, f"cannot be listed ({error.strerror}); its checkpoints are not known") from None


def removed(name: str) -> str:
    """What is said of a file that was taken out of a checkpoint to save space."""
    return f"its {name} was removed by `cmt runs rm`"


def ema_sum(manifest: Mapping[str, Any]) -> str:
    """Checksum of the first EMA of a checkpoint, also where its weights were removed; empty for none."""
    known = {**manifest.get("pruned", {}), **manifest["files"]}
    return known.get("ema-0.safetensors", {}).get("xxh3_128", "")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, by its own checksum; the files that it names are not looked at. Raises CheckpointError."""
    path = folder / "manifest.json"
    try:
        manifest = sound.read(path, signs=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint, it has no manifest.json") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest.get('format')}, this version reads {FORMAT}")
    if not _whole(manifest):
        raise Unsound(path, "is no manifest: it does not say its step, or its files by name, size and checksum")
    return manifest


def _whole(manifest: Mapping[str, Any]) -> bool:
    """Whether it says what every reader relies on."""
    number = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0
    named = [manifest.get("files"), manifest.get("pruned", {})]
    if (
        not number(manifest.get("step"))
        or not number(manifest.get("nimg", 0))
        or not all(isinstance(n, dict) for n in named)
    ):
        return False
    return all(
        "/" not in name and name not in ("", ".", "..") and isinstance(about, dict) and number(about.get("bytes"))
        and isinstance(about.get("xxh3_128"), str)
        for files in named for name, about in files.items()
    )  # fmt: skip


def placed(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises Unsound for a manifest of another step or stage than those of the place where it lies."""
    path = folder / "manifest.json"
    if folder.name.startswith("step-") and folder.name != folder_of(folder, manifest["step"]).name:
        raise Unsound(path, f"is of step {manifest['step']}, its folder was renamed or copied")
    sound.placed(path, manifest, folder.absolute().parents[1])


def sized(folder: Path) -> Checkpoint:
    """A checkpoint that lies where it belongs, whose files are there with their sizes, and of which this process has found none
    damaged: for who needs the manifest, or reads tensors, which are verified then. Raises CheckpointError naming the file.
    """
    manifest = read_manifest(folder)
    placed(folder, manifest)
    for name, want in manifest["files"].items():
        file = folder / name
        try:
            about = os.lstat(file)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
            about = None
        if about is None or not stat.S_ISREG(about.st_mode) or about.st_size != want["bytes"]:
            raise CheckpointError(f"{file}: is missing or has not the {want['bytes']} bytes of the manifest")
        if tensor_file.remembered(file) not in (None, want["xxh3_128"]):
            raise Damaged(file, "does not match its checksum")
    return Checkpoint(folder, manifest)


def verify(folder: Path) -> Checkpoint:
    """The same with every byte read, those that this process knows aside: for who does not read tensors afterwards, as before
    something is deleted. Raises CheckpointError naming the file.
    """
    found = sized(folder)
    for name, want in found.manifest["files"].items():
        try:
            same = checksum(folder / name) == want["xxh3_128"]
        except OSError as error:
            raise Damaged(folder / name, f"cannot be read ({error.strerror})") from None
        if not same:
            raise Damaged(folder / name, "does not match its checksum")
    return found


def latest(stage_dir: Path, reads: Callable[[Path], Checkpoint] = verify) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none at all; says on stderr which ones it passed over.

    reads: `verify`, or `sized` for who looks at the manifest, or reads tensors and comes back where they raise Damaged.
    """
    found = steps(stage_dir)
    for path in strays(stage_dir):
        _pass_over(f"{path}: is not the name of a checkpoint, it was renamed")
    for step in reversed(found):
        try:
            return reads(folder_of(stage_dir, step))
        except CheckpointError as error:
            _pass_over(str(error))
    if found:
        anew = f"move {stage_dir} away to train the stage anew"
        raise CheckpointError(f"{stage_dir}: none of its {len(found)} checkpoints is whole; {anew}")
    return None


def _pass_over(why: str) -> None:
    """Say it once: a start looks for the newest several times."""
    if why not in _passed_over:
        _passed_over.add(why)
        print(f"checkpoint passed over: {why}", file=sys.stderr)


def set_aside(folder: Path) -> None:
    """Take a damaged checkpoint out of its stage, whose next run finds the one before it without reading this one. Its files are
    left, under a name that `cmt runs rm` clears away. The only one of a stage stays: without it the stage would begin anew.
    """
    if len(steps(folder.parents[1])) < 2:
        return
    aside = folder.with_name(f".tmp-damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    sync(folder.parent)


def newest(stage_dir: Path) -> Checkpoint | None:
    """`latest` by sizes and by what this process knows: no tensor is read."""
    return latest(stage_dir, sized)


def complete(stage_dir: Path) -> Checkpoint:
    """The final checkpoint of a finished stage, as `newest`. Raises CheckpointError if the stage is not finished, or keeps no
    weights."""
    found = newest(stage_dir)
    if found is None:
        raise CheckpointError(f"{stage_dir}: holds no checkpoint")
    if not found.manifest.get("done"):
        raise CheckpointError(f"{stage_dir}: is not finished (step {found.manifest['step']})")
    if "ema-0.safetensors" in found.manifest.get("pruned", {}):
        raise CheckpointError(f"{found.folder}: {removed('ema-0')}; {NO_WEIGHTS}")
    return found


__all__ = [
    "Checkpoint", "CheckpointError", "Damaged", "Tensors", "canonical", "complete", "ema_sum", "folder_of", "latest",
    "newest", "placed", "read_manifest", "removed", "save", "set_aside", "signed", "size", "sized", "steps", "strays", "verify",
]  # fmt: skip
