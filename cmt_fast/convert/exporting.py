"""A stage's network as one safetensors file.

The weights are those of an EMA track, in fp32, under our names; beside them goes what is needed to build the network and
sample from it, and where it comes from: the resolved run, its digest and the lineage back to data or an imported file.
A folder that diffusers loads is written by diffusers_folder.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cmt_fast import __version__
from cmt_fast.config import loading, paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.storage import files as files_

FORMATS = {".safetensors": "safetensors", ".onnx": "onnx", ".pt": "edm2, dit, sit or meanflow"}  # what a name promises


class Export(NamedTuple):
    """One network ready to be written. about: run, digest, lineage, as JSON types."""

    work: Workspace
    stage: str
    weights: dict[str, Tensor]
    manifest: dict[str, Any]
    about: dict[str, Any]


def collect(work: Workspace, stage: str, track: int = 0) -> Export:
    """The EMA track `track` of a finished stage. Raises ConfigError where there is none."""
    try:
        found = checkpoint.complete(work.stage_dir(stage))
        tracks = [name for name in found.manifest["files"] if name.startswith("ema-")]
        if f"ema-{track}.safetensors" not in tracks:
            raise ConfigError(f"--ema: {track} is no EMA of {stage}, which has {_range(len(tracks))}")
        weights = found.tensors(f"ema-{track}")
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"{stage}: {error}") from None
    m = found.manifest
    lineage = {k: m[k] for k in ("stage", "step", "nimg", "config", "parent")}
    lineage["ema"] = m["files"][f"ema-{track}.safetensors"]["xxh3_128"]
    about = {
        "version": __version__,
        "stage": stage,
        "run": loading.dump(work.run),
        "digest": m["config"],
        "lineage": lineage,
    }
    return Export(work, stage, weights, m, about)


def to_safetensors(export: Export, out: Path) -> None:
    """Write one file; all that is known of the network is JSON under the key "cmt-fast" of its metadata."""
    claim(out, ".safetensors")
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        about = {**export.about, "run": paths.unplaced(export.about["run"])}
        files_.save_tensors(temporary, export.weights, {"format": "pt", "cmt-fast": json.dumps(about, sort_keys=True)})
        files_.sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def check_plain(export: Export, form: str) -> None:
    """Raises ConfigError for a network that only our own code can call: one that is told its guidance, or has a head."""
    for key in ("guided", "velocity_head"):
        value = getattr(export.work.run.model, key, None)
        if value not in (None, False):
            raise ConfigError(
                f"--format: {form} has no place for model.{key} {value}; --format safetensors keeps the network whole"
            )


def _range(n: int) -> str:
    return "0 alone" if n == 1 else f"0 to {n - 1}" if n else "none"


def claim(out: Path, *suffixes: str) -> None:
    """Raises ConfigError where nothing can be written, or under a name that says otherwise; without suffixes for a folder."""
    if out.exists():
        raise ConfigError(f"OUT: {str(out)!r} exists already; choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"OUT: the folder of {str(out)!r} does not exist")
    if suffixes and out.suffix not in suffixes:
        other = FORMATS.get(out.suffix)
        hint = f"; --format {other} writes such a one" if other else ""
        raise ConfigError(f"OUT: {str(out)!r} does not end in {' or '.join(suffixes)}{hint}")
    if not suffixes and out.suffix in FORMATS:
        raise ConfigError(f"OUT: {str(out)!r} is the name of a file, and a folder is written")
