"""What a stage's weights come from as it begins, or goes on: its newest checkpoint, or its parent's EMA.

Files are read by one rank, each once, and hashed while their tensors go to all ranks. What is damaged is found at a file's end:
then all ranks raise Damaged, nothing of what was read is trained from, and the loop begins the stage anew without that file.
Which checkpoint is the newest one says too: where a folder is listed from a cache, as by NFS, others may see it late.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from cmt_fast.config.schema import Stage
from cmt_fast.engine import Engine
from cmt_fast.run import changes
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, progress, shared
from cmt_fast.runtime.progress import say
from cmt_fast.storage import checkpoint, files, sound


def all_see(run: Path) -> None:
    """Wait until every rank sees the checkpoints that the first one sees: a stage may be begun from them. Not without end; who
    needs one says that it is not there."""
    if distributed.size() == 1:
        return
    want = json.loads(distributed.text_of_first(json.dumps(_listed(run))))
    distributed.all_see(lambda: _listed(run) == want)


def _listed(run: Path) -> list[list[int] | None]:
    out: list[list[int] | None] = []
    for name in sound.STAGES:
        try:
            out.append(checkpoint.steps(run / name))
        except checkpoint.CheckpointError:
            out.append(None)
    return out


@progress.phase("reading the checkpoint", quiet=True)
def load(engine: Engine, found: checkpoint.Checkpoint, stage: ResolvedStage) -> None:
    """Go on from a checkpoint, read once by one rank, and say so. Raises CheckpointError when it lacks what the engine needs,
    Damaged on all ranks where its bytes are not those that were written."""
    files = {f: shared.stream(found, f) for f in engine.state()}
    try:
        engine.load(files, found.manifest["step"])
    except checkpoint.Damaged:
        raise
    except (KeyError, ValueError) as error:
        for tensors in files.values():  # names may differ because of what is damaged
            tensors.check()
        if not isinstance(error, KeyError):
            raise
        raise checkpoint.CheckpointError(f"{found.folder}: holds no {error}; it is of another version") from None
    if distributed.rank() == 0:
        step, images = engine.step_count, found.manifest["nimg"]
        say(f"{stage.name:>8} resumes at step {step:,} of {stage.schedule.total:,} ({images:,} images)")
        for line in changes.lines(stage.changes):
            say(f"{stage.name:>8} {line}")


@progress.phase("checking the checkpoints")
def newest(folder: Path, contents: Collection[str] | None = None) -> checkpoint.Checkpoint | None:
    """The newest whose files have their sizes; their checksums are known when they have been read. Every rank must call it: all
    go on from what the first one finds.

    contents: digests of the settings that the run has had for this stage; a checkpoint of others was copied here, and is passed
    over. None, and a checkpoint of a version that wrote none: not compared.
    """

    def own(place: Path) -> checkpoint.Checkpoint:
        found = checkpoint.sized(place)
        content = found.manifest.get("content")
        if contents is not None and content is not None and content not in contents:
            raise checkpoint.CheckpointError(
                f"{place}: was trained with settings that this run never had: it was copied here"
            )
        return found

    def look() -> bytes:
        found = checkpoint.latest(folder, own)
        return json.dumps(found and [found.folder.name, found.manifest]).encode()

    found = json.loads(distributed.from_first(look, checkpoint.CheckpointError))
    return found and checkpoint.Checkpoint(folder / "checkpoints" / found[0], found[1])


@progress.phase("reading the weights to start from", quiet=True)
def parent(work: Workspace, stage: Stage, engine: Engine, fresh: bool) -> dict | None:
    """Start from the parent stage's EMA, and say in the lineage which file that was."""
    if stage.start is None:
        return None
    manifest = work.finished(stage.start).manifest
    if fresh:
        weights, _ = work.weights(stage.start, together=True)
        try:
            engine.start_from(weights)
        except checkpoint.Damaged:
            raise
        except ValueError:
            weights.check()  # names may differ because of what is damaged
            raise
    return {
        "stage": stage.start,
        "step": manifest["step"],
        "nimg": manifest["nimg"],
        "config": manifest["config"],
        "ema": manifest["files"]["ema-0.safetensors"]["xxh3_128"],
        "parent": manifest["parent"],
        **({"changes": manifest["changes"]} if manifest.get("changes") else {}),
    }


def going_on(work: Workspace, stage: ResolvedStage, found: checkpoint.Checkpoint | None) -> ResolvedStage:
    """A stage as it goes on from a checkpoint, with the changes of its keys that count from there, which are put on record."""
    if not work.changes and not (found and found.manifest.get("changes")):  # run.json may have been written anew
        return stage
    work.changes = changes.counted(work.changes, stage, found and found.manifest)
    if distributed.rank() == 0:
        changes.record(work.folder, work.changes)
        entries = work.changes.get(stage.name, ())
        if found and any(entry["step"] == found.manifest["step"] for entry in entries):
            _forget_snapshots(stage.folder, found.manifest["step"])
    return work.stage(stage.name)


def _forget_snapshots(folder: Path, step: int) -> None:
    """Remove the EMA snapshots of steps after `step`: they were taken by settings that count no more, and steps with others may
    never write over them."""
    for track in (folder / "snapshots").glob("ema-*"):
        for later in (n for n in checkpoint.steps(track) if n > step):
            with files.unless_refused():
                shutil.rmtree(checkpoint.folder_of(track, later))


def measured(stage: ResolvedStage, found: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
    """The checkpoint whose measurements of rounding hold: none where the precision, or its limit, is another from there on."""
    last = stage.changes[-1] if found and stage.changes else None
    anew = last and last["step"] == found.manifest["step"] and {"precision", "rounding_limit"} & last["keys"].keys()
    return None if anew else found


def set_aside(work: Workspace, damaged: checkpoint.Damaged) -> None:
    """Pass over a damaged checkpoint from now on, and in this run for good. All ranks call it: all of them have raised it."""
    if distributed.rank() == 0:
        folder = damaged.file.parent
        print(f"checkpoint passed over: {damaged}", file=sys.stderr)
        if work.folder.resolve() in folder.resolve().parents:
            with files.unless_refused():
                checkpoint.set_aside(folder)
    distributed.barrier()
