"""A run's folder and what lives around it: data, device, networks in and out of it, the judge.

RUN/run.json      resolved recipe, its hash, op table, environment
RUN/<stage>/      metrics.jsonl, checkpoints/, snapshots/, grids/
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import cmt_kernels
import torch
from torch import Tensor, nn

from cmt_fast import __version__, checkpoint, config, distributed, metrics, models, stages
from cmt_fast import data as datasets
from cmt_fast.codec import Codec
from cmt_fast.config import ConfigError
from cmt_fast.engine import load_named
from cmt_fast.paths import Path as ForwardPath
from cmt_fast.sample import Setting
from cmt_fast.schema import STAGES, Run

RUN_FILE = "run.json"


class Workspace:
    """One run on one device. Raises ConfigError for data, model or device that cannot be had; writes nothing."""

    def __init__(self, run: Run, folder: Path, parents: Path | None = None) -> None:
        """folder: the run's own; parents: where stages that are not trained here are found (default: the same)."""
        self.run, self.folder, self.parents = run, folder, parents or folder
        self.device = device(run.device)
        try:
            self.data = datasets.load(run.data)
            stages.check(run, self.data.shape, self.data.classes)
            self.build()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.path = ForwardPath(run.path, run.sigma_data)
        self.setting = Setting(self.path, run.sampler, self.data.shape, self.data.classes, self.device)

    def build(self) -> nn.Module:
        """A fresh network, initialised from the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.seed)
            return models.build(self.run.model, self.run.path, self.run.sigma_data, self.data.shape, self.data.classes)

    def stage_dir(self, name: str) -> Path:
        """Where a stage lives: in this run, or where its parents are."""
        own = self.folder / name
        return own if checkpoint.steps(own) else self.parents / name

    def weights(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """The hand-over of a finished stage: its first EMA track and its manifest. Raises ConfigError if not there."""
        try:
            found = checkpoint.complete(self.stage_dir(name))
        except checkpoint.CheckpointError as error:
            raise ConfigError(f"{name}: {error}; train it first") from None
        return found.tensors("ema-0"), found.manifest

    def network(self, name: str) -> nn.Module:
        """The frozen network of a finished stage, EMA weights, in fp32."""
        net = self.build().to(self.device)
        load_named(net, self.weights(name)[0])
        return net.requires_grad_(False).eval()

    @property
    def _latents(self):
        """The index of the store where this run's data are latents, else None."""
        index = self.data.index if self.run.data.kind == "latents" else None
        return index if index and index.kind != "pixels" else None

    def codec(self, source: str | None = None) -> Codec:
        """The autoencoder of this run's latents, from `source` or from where the store says that it was.

        Raises ConfigError when the data are no latents, or it is not there or not the one that made them.
        """
        index = self._latents
        if index is None:
            raise ConfigError(f"--decode: this run's data ({self.run.data.kind}) are no latents")
        if not (source or index.vae):
            raise ConfigError("--vae: is missing, and the store does not say which autoencoder made it")
        found = Codec.open(source or index.vae, self.device, self.data.normalisation)
        if index.vae_xxh3_128 and found.digest != index.vae_xxh3_128:
            raise ConfigError(f"--vae: {found.name!r} is not the autoencoder that made the latents, its weights differ")
        return found

    @functools.cached_property
    def _decoder(self) -> Codec | str:
        try:
            return self.codec()
        except ConfigError as error:
            return str(error)

    def visible(self, x: Tensor) -> tuple[Tensor, str]:
        """Samples (n, ...) as they can be shown, and a note: latents are decoded where their autoencoder is at hand."""
        index = self._latents
        if index is None:
            return x, ""
        if isinstance(self._decoder, Codec):
            return self._decoder.decode(x), ""
        channels = 3 if x.shape[1] >= 3 else 1
        n = self.data.normalisation
        std = torch.tensor([n.scale * a / b for a, b in zip(index.std, n.std)])[:channels].view(-1, 1, 1)
        return x[:, :channels] / (3 * std), f"latents, {channels} of {x.shape[1]}"

    @functools.cached_property
    def space(self) -> metrics.Extractor:
        return metrics.extractor(self.data, self.folder if self.folder.is_dir() else self.parents)

    @functools.cached_property
    def judge(self) -> metrics.Judge:
        return metrics.Judge(self.data, self.space)

    def evaluate(self, net, steps: tuple[int, ...], n: int, solver: bool = False, seed: int | None = None) -> dict:
        """{steps: {"frechet", "sliced_wasserstein", "accuracy"}} of n samples each."""
        e, out = self.run.eval, {}
        for k in steps:
            samples = self.setting.generate(net, k, n, e.seed if seed is None else seed, solver, e.batch)
            if not torch.isfinite(samples).all():
                raise FloatingPointError(f"samples of {k} steps are not finite")
            out[str(k)] = self.judge(samples, self.setting.labels(torch.arange(n)))
        return out

    def compare(self) -> Run | None:
        """The run stored in the folder, if any; stages not begun may differ from it.

        Raises ConfigError when a stage that has begun was trained with other settings, its own or its ancestors', or on
        other rows.
        """
        if not (self.folder / RUN_FILE).is_file():
            return None
        stored = stored_run(self.folder)
        for name in STAGES:
            if not checkpoint.steps(self.folder / name) or stored.stage(name) is None:
                continue
            mine = config.stage_facts(self.run, name) if self.run.stage(name) else {name: None}
            differs = config.changed(config.stage_facts(stored, name), mine)
            if differs:
                raise ConfigError(
                    f"--out: {self.folder} holds {name} of another configuration ({'; '.join(differs[:3])}); "
                    "choose another folder"
                )
            rows = config.changed(_about(self.folder).get("data") or self.data.facts, self.data.facts)
            if rows:
                raise ConfigError(
                    f"data: these are not the rows that {self.folder / name} was trained on ({'; '.join(rows)})"
                )
        return stored

    def claim(self) -> None:
        """Create the folder and write run.json. Raises ConfigError as `compare` does."""
        stored = self.compare()
        if (
            stored
            and config.dump(stored) == config.dump(self.run)
            and _about(self.folder).get("data") == self.data.facts
        ):
            return
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {
                "digest": config.digest(self.run),
                "run": config.dump(self.run),
                "data": self.data.facts,
                "environment": environment(),
                "ops": cmt_kernels.table(self.device.type),
                "parents": str(self.parents) if self.parents != self.folder else None,
            }
            checkpoint.write_text(self.folder / RUN_FILE, json.dumps(about, indent=1))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process (group) at a time: a second one is refused at once; the system frees the lock of a dead one."""
        if distributed.rank():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out: {self.folder} is in use by another process") from None
            yield


def _about(folder: Path) -> dict:
    """run.json of a run."""
    return json.loads((folder / RUN_FILE).read_text("utf-8"))


def stored_run(folder: Path) -> Run:
    """The resolved run of a folder. Raises ConfigError naming the folder."""
    file = folder / RUN_FILE
    try:
        return config.build(json.loads(file.read_text("utf-8"))["run"])
    except FileNotFoundError:
        raise ConfigError(f"RUN: {str(folder)!r} is no run, it has no {RUN_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"RUN: {file} cannot be read ({error})") from None


def open_stage(text: str) -> tuple[Workspace, str]:
    """`RUN/stage` as typed. Raises ConfigError naming what is valid."""
    path = Path(text)
    if path.name not in STAGES:
        raise ConfigError(
            f"RUN/STAGE: {text!r} does not end in a stage; valid are {', '.join(STAGES)}{config.nearest(path.name, STAGES)}"
        )
    run = stored_run(path.parent)
    about = _about(path.parent)
    return Workspace(run, path.parent, Path(about["parents"]) if about.get("parents") else None), path.name


def device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not valid; valid are auto, cpu, cuda, cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not valid; valid are auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ConfigError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(found)
    return found


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the recipe."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cmt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "gpu": accelerator,
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
