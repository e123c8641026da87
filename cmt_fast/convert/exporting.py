"""A stage's network as one safetensors file, or as a folder that diffusers loads.

The weights are those of an EMA track, in fp32, under our names; beside them goes what is needed to build the network and
sample from it, and where it comes from: the resolved run, its digest and the lineage back to data or an imported file.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from cmt_fast import __version__
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.convert import card
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.storage import files as files_

# what `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` runs of the folder: an import of the package
REMOTE = '"""Loads with cmt-fast installed: pip install cmt-fast."""\n\nfrom cmt_fast.convert.pipeline import {name}\n'
NETWORK_FILE = "cmt_network"


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
    _claim(out)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        tensors = {k: t.contiguous() for k, t in export.weights.items()}
        save_file(tensors, temporary, {"format": "pt", "cmt-fast": json.dumps(export.about, sort_keys=True)})
        files_.sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def to_diffusers(export: Export, out: Path, vae: Path | None = None, license: str | None = None) -> None:
    """Write a pipeline's folder: model_index.json, network/, vae/ where one is given, the model card.

    vae: an AutoencoderKL's folder, copied. Without one nothing of diffusers is needed.
    """
    _claim(out)
    if vae is not None and not (vae / "config.json").is_file():
        raise ConfigError(f"--vae: {str(vae)!r} holds no config.json, it is no autoencoder's folder")
    run, data = export.work.run, export.work.data
    latents, law = _latents(export.work), export.work.setting.law
    even = law.even and len(law.present) == len(law.counts)
    if vae is not None and latents is None:
        raise ConfigError("--vae: the run's data are no latents, nothing is decoded")
    if vae is not None:
        export.work.decoding.codec(str(vae))  # refuses one that did not make the latents
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    tree = loading.dump(run)
    index = {
        "_class_name": ["pipeline", "CmtPipeline"],
        "network": [NETWORK_FILE, "CmtNetwork"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
        "sampler": tree["sampler"],
        "latents": latents,
        "labels": None if even else law.counts.tolist(),
        "many_steps": run.stages[export.stage].objective.kind in DIFFUSION,
    }
    network = {
        "_class_name": "CmtNetwork",
        "model": tree["model"],
        "path": run.path,
        "sigma_data": run.sigma_data,
        "shape": list(data.shape),
        "classes": data.classes,
    }
    try:
        folder = temporary / "network"
        folder.mkdir(parents=True)
        _text(temporary / "model_index.json", json.dumps(index, indent=2))
        _text(temporary / "pipeline.py", REMOTE.format(name="CmtPipeline"))
        _text(folder / f"{NETWORK_FILE}.py", REMOTE.format(name="CmtNetwork"))
        _text(folder / "config.json", json.dumps(network, indent=2))
        prefixed = export._replace(weights={f"net.{k}": t for k, t in export.weights.items()})
        to_safetensors(prefixed, folder / "diffusion_pytorch_model.safetensors")
        if vae is not None:
            _copy(vae, temporary / "vae")
        _text(temporary / "README.md", card.markdown(export.work, export.stage, export.about, license, latents))
        os.replace(temporary, out)
        files_.sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _latents(work: Workspace) -> dict[str, Any] | None:
    """How the data's latents are scaled, and the name of their autoencoder; None for pixels and vectors."""
    index = work.decoding.latents
    if index is None:
        return None
    constants, numbers = work.data.normalisation, lambda values: [float(v) for v in values]
    vae = {"vae": index.vae, "vae_xxh3_128": index.vae_xxh3_128}
    return {"mean": numbers(constants.mean), "std": numbers(constants.std), "scale": float(constants.scale), **vae}


def _copy(vae: Path, to: Path) -> None:
    """An autoencoder's settings and safetensors; no other file of its folder."""
    to.mkdir()
    files = [vae / "config.json", *sorted(vae.glob("*.safetensors"))]
    if len(files) == 1:
        raise ConfigError(f"--vae: {str(vae)!r} holds no .safetensors")
    for file in files:
        shutil.copyfile(file, to / file.name)


def _claim(out: Path) -> None:
    """Raises ConfigError where nothing can be written."""
    if out.exists():
        raise ConfigError(f"OUT: {str(out)!r} exists already; choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"OUT: the folder of {str(out)!r} does not exist")


def _text(path: Path, text: str) -> None:
    files_.write_text(path, text if text.endswith("\n") else text + "\n")
