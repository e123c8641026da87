"""A run's folder and what lives around it: data, device, networks in and out of it, the judge.

RUN/run.json      resolved recipe, its hash, op table, environment
RUN/<stage>/      metrics.jsonl, checkpoints/, snapshots/, grids/
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cmt_kernels
import torch
from torch import Tensor, nn

from cmt_fast import engine
from cmt_fast.config import errors, fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES, Run, Stage
from cmt_fast.data import classes, datasets
from cmt_fast.data import trajectory_store as rolled
from cmt_fast.data.rows import Rows
from cmt_fast.diffusion.labels import Law, Some
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.engine import sharding
from cmt_fast.engine.buffers import Unread, check_fits, read
from cmt_fast.perceptual import distance
from cmt_fast.run import absent, changes, guidance, networks, recorded
from cmt_fast.run.decoding import Decoding
from cmt_fast.run.folder import (
    RUN_FILE,
    about_run,
    classes_of,
    is_run,
    judged_by,
    located,
    locked,
    parents_of,
    read_run,
    seen,
    stored_run,
)
from cmt_fast.run.judging import Judging
from cmt_fast.run.networks import check, deferred_network, fits, fresh_network, parameters, rows_of
from cmt_fast.run.resolved import ResolvedStage, resolve
from cmt_fast.runtime import distributed, machine, shared
from cmt_fast.storage import checkpoint, files, sound


class Workspace:
    """One run on one device. Raises ConfigError for data, model or device that cannot be had; writes nothing."""

    def __init__(
        self, run: Run, folder: Path, parents: Path | None = None, data: Rows | None = None, reading: bool = False,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """folder: the run's own; parents: where stages that are not trained here are found (default: the same).

        data: in the place of the recipe's, for what reads none (run/absent.py). reading: guidance of stages that stand
        already is not asked about, and what the run remembers of its data serves until something reads their rows.
        device: in the place of the recipe's, where no network is called.
        """
        self.run, self.folder, self.parents = run, folder, parents or folder
        self.device = machine.device(run.device) if device is None else device
        try:
            self.data = self._opened(reading) if data is None else data
            check(run, self.data.shape, self.data.classes)
            law = self._law()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not reading:
            self.check_guidance()
        self.path = ProbabilityPath(run.path, run.sigma_data)
        self.setting = Sampler(self.path, run.sampler, self.data.shape, law, self.device)
        self.decoding = Decoding(self.data, self.device, run.eval.vae)
        self.judging = Judging(run, self.data, self.setting, self.decoding, folder, self.parents)
        self.judging.alive = None if reading else folder
        self.changing: changes.Asked = {}  # what `--change` asks for
        self.changes = changes.recorded(folder)  # of stages under way
        self.contents: dict[str, list[str]] = {}  # digests of the settings that it has had for each stage, once claimed
        self.drawn_rows: dict[tuple, Tensor] = {}  # of grids, by what they show: a teacher's row does not change

    def _opened(self, reading: bool) -> Rows:
        """The run's data or, where it is only read, what it remembers of them. Raises ValueError where they cannot be had."""
        kept = absent.remembered(self.run.data, self.folder) if reading else None
        if kept is None:
            return datasets.load(self.run.data, classes_of(self.folder))
        if kept.whole:
            return kept
        if kept.here:  # of an older version, or its data were not there: what it does not know of them they say
            return kept.opened()
        if kept.old and kept.classes and self.run.eval.labels == "data" and distributed.rank() == 0:
            print(f"note: {absent.uncounted(self.folder)}", file=sys.stderr)
        return kept

    def _law(self) -> Law:
        """Of the labels of samples. Raises ConfigError naming eval.labels, but for a file of them that the run has read."""
        asked = self.run.eval.labels
        if asked not in ("data", "uniform") and not os.path.exists(asked):
            kept = absent.remembered(self.run.data, self.folder)
            if kept and kept.law.get("labels") == asked and kept.classes == self.data.classes:
                return Law(torch.tensor(kept.law["counts"]), kept.law["name"])
        return classes.law(self.data, asked)

    @property
    def place(self) -> guidance.Place:
        """The run and where its stages are."""
        return guidance.Place(self.run, self.folder, self.parents)

    def check_guidance(self) -> None:
        """Raises ConfigError for guidance and dropped labels that mean nothing, as `guidance.check`."""
        guidance.check(self.place, self.data.classes)

    def build(self) -> nn.Module:
        """A fresh network, initialised from the run's seed."""
        return fresh_network(self.run, self.data.shape, self.data.classes, self.run.seed)

    def engine_of(
        self, stage: ResolvedStage, grad_accum_steps: int, choice: engine.ShardingPlan, found: bool = False
    ) -> engine.Engine:
        """The engine of a stage of this run, with the weights of `build` where none follow: of a parent, or `found`."""
        run, late = self.run, deferred_network(self.run, self.data.shape, self.data.classes, self.run.seed)
        numbers = () if found or stage.config.start else late.numbers()
        return engine.build(run, late.net, stage.config, self.device, grad_accum_steps, choice, numbers)

    @property
    def drawn(self) -> int | Some:
        """Classes that trajectories start from, each as often: how many, or those that have rows."""
        return classes.drawn(self.data)

    def stage_dir(self, name: str) -> Path:
        """Where a stage lives: in this run, or where its parents are; RUN/STAGE in the other run."""
        folder, parents = self.folder, self.parents
        if "/" in name:
            folder, name = self.other(name), Path(name).name
            parents = parents_of(folder) or folder
        return folder / name if checkpoint.steps(folder / name) else parents / name

    def other(self, name: str) -> Path:
        """The folder of another run's stage RUN/STAGE."""
        return located(Path(name).parent, self.folder)

    def finished(self, name: str) -> checkpoint.Checkpoint:
        """The last checkpoint of a finished stage, by its manifest and sizes: tensors are verified where they are read.

        Raises ConfigError if it is not there, or another run's does not fit.
        """
        where = self.stage_dir(name)
        if "/" in name or where.parent != self.folder:
            fits(str(where) if "/" not in name else str(self.other(name) / Path(name).name), self.run, self.data)
        try:
            return checkpoint.complete(where)
        except checkpoint.CheckpointError as error:
            raise ConfigError(f"{name}: {error}; train it first") from None

    def weights(self, name: str, together: bool = False) -> tuple[checkpoint.Tensors, dict]:
        """The hand-over of a finished stage: its first EMA track, verified when all of it was fetched, and its manifest.

        together: every rank calls it, and fetches all: one of them reads. Raises ConfigError as `finished`, Damaged.
        """
        found = self.finished(name)
        return shared.stream(found, "ema-0") if together else found.stream("ema-0"), found.manifest

    def network(self, name: str, together: bool = False) -> nn.Module:
        """The frozen network of a finished stage of this run or, as RUN/STAGE, of another; EMA weights, in fp32.

        together: as of `weights`. Raises ConfigError when weights and network differ in a name or shape, Damaged when the
        weights are not those that were written.
        """
        try:
            return read(self.unread(name, together), self.device)
        except checkpoint.Damaged as error:
            if together or distributed.size() == 1:
                raise
            raise checkpoint.CheckpointError(str(error)) from None  # of this rank alone: the others do not know

    def unread(self, name: str, together: bool = False) -> Unread:
        """The same network before its weights are read: an engine reads them as it holds them."""
        run = stored_run(self.other(name)) if "/" in name else self.run
        weights = self.weights(name, together)[0]
        try:
            net = deferred_network(run, self.data.shape, self.data.classes).net
            check_fits(net, weights)
        except ValueError as error:
            weights.check()  # names may differ because of what is damaged
            raise ConfigError(f"{name}: {error}") from None
        return Unread(net, weights)

    def identity(self, stage: Stage) -> str:
        """Checksums of the weights that a stage's trajectories depend on, the guide's too. Raises ConfigError as `finished`."""
        guide = stage.autoguidance
        named = [stage.teacher, guide.network] if guide and guide.trajectories else [stage.teacher]
        if not stage.teacher:
            raise ConfigError("teacher: is missing")
        manifests = [self.finished(name).manifest for name in named if name]
        guidance.check_apart("autoguidance.network", manifests)
        return " + ".join(m["files"]["ema-0.safetensors"]["xxh3_128"] for m in manifests)

    def trajectories(self, stage: Stage) -> dict:
        """What a stage's trajectories are, as `data.trajectories.check` compares it; "teacher" where it is at hand."""
        about = rolled.meant(self.run, stage, self.data)
        with contextlib.suppress(ConfigError):
            about["teacher"] = self.identity(stage)
        return about

    def external_inputs(self, stage: ResolvedStage) -> dict[str, dict]:
        """What a stage reads outside this run, by key, with checksums: networks of other runs, cached trajectories, the
        perceptual network's.

        Raises ConfigError for what is not there or does not fit.
        """
        found: dict[str, dict] = {}
        if stage.cache:
            found["trajectories.cache"] = rolled.check(stage.cache, self.trajectories(stage.config))
        for key, name in stage.called.items():
            if "/" in name:
                m = self.finished(name).manifest
                found[key] = {"stage": name, "config": m["config"], "ema": m["files"]["ema-0.safetensors"]["xxh3_128"]}
        both = [stage.called[key] for key in ("teacher", "autoguidance.network") if key in stage.called]
        with contextlib.suppress(checkpoint.CheckpointError):  # a stage of this run may have to be trained first
            manifests = [checkpoint.complete(self.stage_dir(name)).manifest for name in both]
            guidance.check_apart(f"{stage.name}.autoguidance.network", manifests)
        if stage.config.perceptual:
            found["perceptual"] = distance.checksums(stage.config.perceptual)
        return found

    def rows(self) -> dict:
        """What another run's network must have been trained on to be read here: shape, classes, normalisation."""
        return rows_of(self.data)

    def stage(self, name: str) -> ResolvedStage:
        """A stage of this run, resolved. Raises ConfigError where the run has none of this name."""
        return resolve(self.run, name, self.folder).changed(self.changes.get(name, ()))

    def sharding_plan(self, stage: ResolvedStage, teacher_parameters: int | None = None) -> engine.ShardingPlan:
        """The engine's ZeRO stage for one stage of this run (teacher_parameters: in the place of its own), with the arithmetic.
        Raises ConfigError where the engine cannot be had as asked."""
        run, config = self.run, stage.config
        held = {name for key, name in stage.called.items() if key != "start"}  # teacher and guide, of any size
        sizes = [self._parameters(stored_run(self.other(n))) if "/" in n else self.parameters for n in held]
        teacher = sum(sizes) if teacher_parameters is None else teacher_parameters
        size = self.size._replace(teacher_parameters=teacher, tracks=len(config.ema), bf16=config.half)
        given = size, distributed.size(), sharding.memory_bytes(self.device)
        choice = engine.choose(run.engine, run.zero_stage, run.zero_teacher, *given)
        engine.check(run, stage.name, config, choice, self.device)
        return choice

    @functools.cached_property
    def size(self) -> sharding.StageSize:
        """Of the network alone, for the sizing."""
        return sharding.measure(networks.shapes_of(self.run, self.data.shape, self.data.classes))

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of the network."""
        return self.size.parameters

    def _parameters(self, run: Run) -> int:
        return parameters(run, self.data.shape, self.data.classes)

    def compare(self) -> Run | None:
        """The run stored in the folder, if any; stages not begun may differ from it.

        Raises ConfigError when a stage that has begun was trained with other settings, its own or its ancestors', or on
        other rows.
        """
        if not os.path.lexists(self.folder / RUN_FILE) or recorded.lost(self.run, self.folder):
            return None
        stored = stored_run(self.folder)
        meant = changes.onto(stored, self.changing)
        # where its rows are on record they say whether the data are the same, not the path
        facts = fingerprint.content if about_run(self.folder).get("data") else fingerprint.stage_facts
        for name in STAGES:
            if not checkpoint.steps(self.folder / name) or name not in stored.stages:
                continue
            mine = facts(self.run, name) if name in self.run.stages else {name: None}
            differs = fingerprint.changed(facts(meant, name), mine)
            if differs:
                raise ConfigError(
                    f"--out: {self.folder} holds {name} of another configuration ({'; '.join(differs[:3])}); "
                    f"choose another folder{changes.hint(name, differs)}"
                )
            rows = fingerprint.changed(about_run(self.folder).get("data") or self.data.facts, self.data.facts)
            if rows:
                raise ConfigError(
                    f"data: these are not the rows that {self.folder / name} was trained on ({'; '.join(rows)})"
                )
            if name in self.run.stages:
                self._same_inputs(meant, name)
        return stored

    def _same_inputs(self, stored: Run, name: str) -> None:
        """Raises ConfigError where a stage that has begun is said to read something elsewhere, and that is another thing.

        What a stage of another folder reads cannot be compared there, so its networks must be those that were named.
        """
        was, now = (fingerprint.stage_facts(run, name) for run in (stored, self.run))
        networks = lambda run, n: run.stages[n].networks()
        for member in (name, *self.run.ancestors(name)):
            if was[member] == now[member]:
                continue
            found = checkpoint.newest(self.folder / member)
            if found and found.manifest.get("others"):
                others = self.external_inputs(self.stage(member))
                fingerprint.check_inputs(member, found.manifest["others"], others)
            elif found is None and networks(stored, member) != networks(self.run, member):
                differs = "; ".join(fingerprint.changed(networks(stored, member), networks(self.run, member)))
                raise ConfigError(f"--out: {self.folder} holds {name} of another configuration ({member}.{differs})")

    def claim(self, names: Sequence[str] = ()) -> None:
        """Create the folder and write run.json; names: the stages that an engine will train.

        Raises ConfigError as `compare` does.
        """
        stored = self.compare()
        before = about_run(self.folder) if stored else {}
        distributed.barrier()  # no rank finds run.json put aside, or written anew, before all have compared
        if not stored and distributed.rank() == 0:
            recorded.put_aside(self.run, self.folder)
        contents = self.contents = recorded.contents(self.run, before, {} if stored else self.changes)
        self.changes, self.changing = changes.pending(self.changes, self.changing), {}
        networks = self._networks(before.get("networks") or {}, names)
        now = {"run": loading.dump(self.run), "data": self.data.facts, "networks": networks, "contents": contents}
        had = {key: before.get(key) for key in now} | ({"run": loading.dump(stored)} if stored else {})
        if had == now and "remembered" in before:
            return
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {
                "digest": fingerprint.digest(self.run),
                **now,
                "rows": self.rows(),
                "remembered": absent.memory(self.data, self.setting.law, self.run.eval.labels, self.decoding.latents),
                "environment": machine.environment(),
                "ops": cmt_kernels.table(self.device.type),
                "engine": {name: self.sharding_plan(self.stage(name))._asdict() for name in names},
                "parents": str(self.parents) if self.parents != self.folder else None,
                "root": str(Path.cwd()),
                "roots": recorded.roots(before),
                **({"changes": self.changes} if self.changes else {}),
            }
            files.write_text(self.folder / RUN_FILE, sound.signed(about))

    def _networks(self, before: dict[str, str], names: Sequence[str]) -> dict[str, str]:
        """As `folder.seen`, the networks of other runs that this one takes: those that are here, else as they were known.

        names: stages that are trained here.
        """
        outside = {n for stage in self.run.stages.values() for n in stage.networks().values() if "/" in n}
        here = {name for name in outside if is_run(self.other(name))}
        places = {name: self.stage_dir(name) for name in sorted(here)}
        if self.parents != self.folder:
            theirs = [n for n in self.run.stages if n not in names and not checkpoint.steps(self.folder / n)]
            places |= {str(self.parents / name): self.parents / name for name in theirs}
        known = {name: ema for name, ema in before.items() if name in outside or name in places}
        return known | seen(places.items())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process (group) at a time: a second one is refused at once; the system frees the lock of a dead one."""
        if distributed.rank():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, "--out"):
            yield


def open_run(folder: Path, evaluation: dict | None = None, device: torch.device | None = None) -> Workspace:
    """A run on disk, to be read; its data are opened where their rows are read, and not before. evaluation: keys of `eval`
    that differ from the run's; device: as of `Workspace`. Raises ConfigError naming what is valid.
    """
    run = judged_by(read_run(folder), evaluation or {})
    return Workspace(run, folder, parents_of(folder), reading=True, device=device)


def open_stage(text: str, evaluation: dict | None = None) -> tuple[Workspace, str]:
    """`RUN/stage` as typed, as `open_run`. Raises ConfigError naming what is valid."""
    path = Path(text)
    if path.name not in STAGES:
        hint = errors.nearest(path.name, STAGES)
        if (path / RUN_FILE).is_file():
            hint = f"; it is a run, whose stages are named {', '.join(str(path / name) for name in stored_run(path).stages)}"
        raise ConfigError(f"RUN/STAGE: {text!r} does not end in a stage; valid are {', '.join(STAGES)}{hint}")
    return open_run(path.parent, evaluation), path.name
