"""Samples of a stage on disk, drawn block by block: a folder of PNGs, or one .npz. The memory is that of one block.

Sample i is a function of (seed, i): its noise, its label, and the noise between steps. A block is `batch` consecutive samples,
drawn together on one rank, so the same request gives the same bytes on any number of ranks, and after any number of kills:
files appear by rename, what is there is not drawn again, and what was cut off does not count. An image drawn alone
differs by the rounding of a batched product, at most a unit in the last place of 8 bits now and then.

OUT/000000.png ...   with what drew them in each file's text
OUT/samples.json     the same once; a folder goes on only under the request that it was begun with
OUT.npz.part/        the blocks of an .npz until it is whole, with the same file
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.data import classes
from cmt_fast.data.autoencoder import Codec
from cmt_fast.diffusion.labels import Law
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.objectives import check_steps
from cmt_fast.render import grids
from cmt_fast.run import claiming, telling
from cmt_fast.run.workspace import Workspace, open_stage
from cmt_fast.runtime import distributed, progress, signals, words
from cmt_fast.storage import files, locks, npz_blocks, sound

ABOUT = "samples.json"
FORMATS = ("png", "arrays", "adm")
SHOWN = 100  # of a grid
PIECE = 16  # latents decoded before they are written: of 512 x 512 pixels 50 MB, and a few times that on the way


class Request(NamedTuple):
    """Samples first to first + n - 1 of a seed, by `steps` network calls; solver: of the ODE. batch: drawn together.

    steps and batch 0 are those of the recipe: one step, or the solver's own number; `eval.batch`.
    """

    n: int = 64
    steps: int = 0
    seed: int = 0
    first: int = 0
    solver: bool = False
    batch: int = 0

    @property
    def blocks(self) -> list[range]:
        """The indices of what is drawn together, in order."""
        end = self.first + self.n
        return [range(i, min(i + self.batch, end)) for i in range(self.first, end, self.batch)]


class Asked(NamedTuple):
    """What else a user may ask for. classes: as typed, in equal parts; guidance: of the solver, or one or several scales that the
    network is told; decode: latents, by `vae`."""

    classes: str | None = None
    guidance: float | tuple[float, ...] | None = None
    decode: bool = False
    vae: str | None = None


def opened(stage: str, request: Request, asked: Asked) -> Drawing:
    """The samples of RUN/STAGE that are asked for; nothing is drawn yet.

    A guided diffusion model is integrated whether or not `solver` is asked for: it has no other samples. Raises ConfigError for
    what cannot be drawn.
    """
    for name, value, least in (("--n", request.n, 1), ("--first", request.first, 0), ("--batch", request.batch, 0)):
        if value < least:
            raise ConfigError(f"{name}: {value} is not at least {least}")
    if not 0 <= request.seed < 1 << 32:  # of others the lower bits would count alone
        raise ConfigError(f"--seed: {request.seed} is not between 0 and {(1 << 32) - 1}")
    work, name = open_stage(stage)
    solver = request.solver or (asked.guidance is not None and work.run.stages[name].objective.kind in DIFFUSION)
    steps = request.steps or (work.run.sampler.teacher_steps if solver else 1)
    request = request._replace(solver=solver, steps=steps, batch=request.batch or work.run.eval.batch)
    work.setting.check_steps((steps,), solver, "--steps")
    if not solver:
        check_steps(work.run.stages[name].objective, (steps,), "--steps")
    if asked.vae and not asked.decode:
        raise ConfigError("--vae: goes with --decode")
    codec = work.decoding.codec(asked.vae) if asked.decode else None
    setting = telling.asked(work, name, solver, asked.guidance)
    if asked.classes is not None:
        if not getattr(work.run.model, "conditional", True):
            raise ConfigError("--class: the network takes no labels (model.conditional false)")
        chosen = torch.tensor(classes.by_name(work.data, asked.classes))
        setting = setting.under(Law.uniform(chosen, work.data.classes))
    return Drawing(work, name, setting, request, codec)


class Drawing:
    """Samples of a stage as a request wants them. codec: decodes latents to images, as bytes."""

    def __init__(
        self, work: Workspace, stage: str, setting: Sampler, request: Request, codec: Codec | None = None
    ) -> None:
        self.work, self.stage, self.setting, self.request, self.codec = work, stage, setting, request, codec
        self._net: nn.Module | None = None
        self._seen: dict[range, list[Tensor]] = {}  # blocks that a grid shows

    @property
    def net(self) -> nn.Module:
        """The stage's network, read when it is first asked for."""
        if self._net is None:
            self._net = self.work.network(self.stage)
        return self._net

    @property
    def how(self) -> str:
        """`2 steps, seed 0`."""
        r = self.request
        solver = f"{' of the ODE solver' * r.solver}{telling.said(self.setting, r.solver)}"
        return f"{words.steps(r.steps)}{solver}, seed {r.seed}"

    def scales(self, rows: range) -> Tensor | None:
        """The guidance scales that these samples are told (m,), where there are several; else None."""
        return self.setting.omega(torch.arange(rows.start, rows.stop)) if self.setting.scales else None

    def block(self, rows: range) -> Iterator[tuple[int, Tensor]]:
        """(index of the first, samples (m, ...) on the CPU) of consecutive samples: data units, or uint8 where decoded."""
        r, keep = self.request, []
        x = self.setting.draw(self.net, r.steps, r.seed, torch.arange(rows.start, rows.stop), r.solver)
        for i, part in enumerate(x.split(PIECE if self.codec else len(x))):
            out = (as_bytes(self.codec.decode(part)) if self.codec else part).cpu()
            if rows.start - r.first + i * PIECE < SHOWN:
                keep.append(out[:SHOWN])
            yield rows.start + i * PIECE, out
        if keep:
            self._seen[rows] = keep

    def shown(self) -> Tensor:
        """The first samples, at most a hundred; drawn where they have not been."""
        parts = []
        for rows in self.request.blocks:
            if rows.start - self.request.first < SHOWN:
                if rows not in self._seen:
                    for _ in self.block(rows):
                        pass
                parts += self._seen[rows]
        return torch.cat(parts)[:SHOWN]

    def labels(self, rows: range) -> Tensor | None:
        """The classes of these samples (m,); None without any."""
        return self.setting.labels(torch.arange(rows.start, rows.stop))

    def about(self, kind: str) -> dict[str, Any]:
        """What draws them, as `samples.json` keeps it."""
        manifest, r = self.work.finished(self.stage).manifest, self.request
        return {
            "kind": kind,
            "run": self.work.run.name,
            "stage": self.stage,
            "digest": manifest["config"],
            "weights": manifest["files"]["ema-0.safetensors"]["xxh3_128"],
            "seed": r.seed,
            "first": r.first,
            "steps": r.steps,
            "solver": self.setting.config.solver if r.solver else None,
            "guidance": telling.kept(self.setting, r.solver),
            "sampler": self._grid(),
            "labels": self.setting.law.text(),
            "classes": self.setting.law.present.tolist(),
            "decoded_by": self.codec.digest if self.codec else None,
            "batch": r.batch,
        }

    def _grid(self) -> dict[str, Any]:
        """Where the network is called, which the recipe says and a trained stage does not depend on."""
        c, r = self.setting.config, self.request
        if r.solver:
            return {"t_max": c.t_max, "t_min": c.t_min, "order": c.order}
        ve = self.setting.path.name == "ve"
        return {"t_max": c.t_max, "mid_times": list(self.setting.mid_times(r.steps))} if ve else {}


class _Place(Protocol):
    """Where blocks go."""

    def has(self, rows: range) -> bool:
        """Whether all of them are there, whole."""

    def block(self, rows: range) -> contextlib.AbstractContextManager[Callable[[int, Tensor], None]]:
        """Inside: the function that takes (index of the first, samples)."""


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded; those that are bytes already as they are. Raises FloatingPointError for NaN."""
    if images.dtype == torch.uint8:
        return images
    if not torch.isfinite(images).all():
        raise FloatingPointError("samples are not finite")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def save(drawing: Drawing, to: str | Path, kind: str | None = None, quiet: bool = False) -> str:
    """Write the request's samples: to a folder of PNGs, or to an .npz where `to` ends so. Every rank calls it.

    kind: "png"; of an .npz "arrays": images (n, ...) float32 in data units, or uint8 where decoded, labels (n,) int64; or
    "adm": arr_0 (n, H, W, 3) uint8 and, with classes, arr_1 (n,), as ADM's evaluator reads it, grey in three channels.
    Returns what it wrote, one line. Raises ConfigError before anything is written: for samples that are no images, and for a
    place with other samples in it, or where another process writes; OSError where nothing can be written; Stopped, on all
    ranks, where one was asked to stop.
    """
    kind, out = kind_of(to, kind), Path(to)
    _check_images(drawing, kind)
    r, about = drawing.request, drawing.about(kind)
    what = {"png": "PNGs", "arrays": "images, labels", "adm": "arr_0, arr_1 as ADM reads them"}[kind]
    law = drawing.setting.law.text()
    said = f"{out}: {r.n:,} samples of {drawing.work.folder / drawing.stage} ({what}), {drawing.how}; labels {law}"
    folder = out if kind == "png" else out.with_name(f"{out.name}.part")
    there = distributed.from_first(lambda: bytes([kind != "png" and claiming.finished(out, about, r.n)]), ConfigError)
    if there[0]:
        if distributed.rank() == 0 and (folder / ABOUT).is_file():
            shutil.rmtree(folder)  # who was killed after the file was whole left its blocks
        return f"{said}; they were there"
    with claiming.alone(folder):
        _claimed(drawing, folder, about)
        place = _Pngs(drawing, folder) if kind == "png" else _Parts(drawing, folder, kind)
        todo = [rows for rows in r.blocks if not place.has(rows)]
        distributed.barrier()  # all have looked before one writes, so they share what is missing in equal parts
        with signals.noted() as asked:
            mine = todo[distributed.rank() :: distributed.size()]
            distributed.agreed(lambda: _write(drawing, place, mine, asked, quiet))
            signals.look()  # one who was asked has left its blocks, and so have the others
        if not all(place.has(rows) for rows in todo):
            raise OSError(f"{folder}: not all samples are there; do all processes write to one file system?")
        distributed.barrier()
        if isinstance(place, _Parts):
            distributed.agreed(lambda: place.join(out, about, quiet) if distributed.rank() == 0 else None)
    return said


def kind_of(to: str | Path, kind: str | None) -> str:
    """The format of OUT: given, or told by its name. Raises ConfigError where the two do not go together."""
    out, folder = Path(to), str(to).endswith("/") or Path(to).is_dir()
    claiming.no_file(out)
    if out.suffix not in ("", ".npz") and not folder:
        raise ConfigError(
            f"--out: {str(out)!r} is neither a folder (FOLDER/) nor an .npz; one picture is --grid FILE.png"
        )
    npz = out.suffix == ".npz" and not folder
    kind = kind or ("arrays" if npz else "png")
    if (kind == "png") == npz:
        other = "an .npz file holds arrays or adm" if npz else "a folder holds png; for arrays and adm name a file .npz"
        raise ConfigError(f"--format: {kind} does not go into {str(out)!r}, {other}")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: the folder of {str(out)!r} does not exist")
    return kind


def _check_images(drawing: Drawing, kind: str) -> None:
    """Raises ConfigError unless samples are images, where they are to be written as such."""
    shape = drawing.setting.shape
    if kind == "arrays" or drawing.codec:
        return
    if drawing.work.decoding.latents:
        raise ConfigError(f"--out: latents are no images; add --decode, or take --format arrays (in place of {kind})")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"--out: samples of shape {tuple(shape)} are no images; take an .npz of arrays")


def _claimed(drawing: Drawing, folder: Path, about: dict[str, Any]) -> None:
    """The folder then is there with its samples.json.

    Raises ConfigError for a folder with other things in it, or other samples, or more than are asked for.
    """
    r, file = drawing.request, folder / ABOUT

    def claim() -> None:
        if file.is_file():
            stored = _read(file)
            claiming.differing(stored, about, folder)
            if stored.get("n", 0) > r.n:
                raise ConfigError(f"--out: {folder} holds {stored['n']:,} samples, more than --n {r.n:,}")
        elif folder.exists() and (not folder.is_dir() or any(f.name not in locks.NAMES for f in folder.iterdir())):
            raise ConfigError(f"--out: {folder} holds other files; choose a new folder")

    distributed.agreed(claim, ConfigError, "the folder of the samples cannot be used")
    distributed.barrier()  # none looks after the first has written
    if distributed.rank() == 0:
        for left in folder.glob(".tmp-*"):
            left.unlink()
        names = dict(enumerate(classes.names(drawing.work.data)))
        named = {"names": [names[k] for k in about["classes"]]}
        files.write_text(file, json.dumps({**about, **named, "n": r.n}, indent=1))
    distributed.barrier()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(sound.data(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--out: {file} cannot be read ({error})") from None
    return found if isinstance(found, dict) else {}


def _write(drawing: Drawing, place: _Place, mine: list[range], asked: list[int], quiet: bool) -> None:
    """Draw these blocks; after a signal to any rank only up to the next piece."""
    left = contextlib.suppress(signals.Stopped)  # a block that is cut is none
    with progress.counting("samples", sum(map(len, mine)), None, quiet) as advance, left:
        for rows in mine:
            with place.block(rows) as put:
                for start, images in drawing.block(rows):
                    put(start, images)
                    advance(len(images))
                    if distributed.anyone(asked):
                        raise signals.Stopped(0)


class _Pngs:
    """A file a sample."""

    def __init__(self, drawing: Drawing, folder: Path) -> None:
        self.drawing, self.folder = drawing, folder
        self.about = {k: v for k, v in drawing.about("png").items() if k not in ("kind", "first", "labels", "classes")}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def has(self, rows: range) -> bool:
        return all(grids.whole_png(self.path(i)) for i in rows)

    @contextlib.contextmanager
    def block(self, rows: range) -> Iterator[Callable[[int, Tensor], None]]:
        labels, scales = self.drawing.labels(rows), self.drawing.scales(rows)

        def put(start: int, images: Tensor) -> None:
            for i, pixels in enumerate(as_bytes(images).numpy(), start):
                if not grids.whole_png(self.path(i)):
                    label = None if labels is None else int(labels[i - rows.start])
                    own = {} if scales is None else {"scale": float(scales[i - rows.start])}
                    self._one(i, pixels, {**self.about, "index": i, "class": label, **own})

        yield put

    def _one(self, index: int, pixels: np.ndarray, about: dict[str, Any]) -> None:
        files.write_bytes(self.path(index), grids.png(pixels, {"cmt-fast": json.dumps(about)}))


class _Parts:
    """A file a block, joined at the end."""

    def __init__(self, drawing: Drawing, folder: Path, kind: str) -> None:
        self.drawing, self.folder, self.kind = drawing, folder, kind
        state = npz_blocks.joined(folder, [len(rows) for rows in drawing.request.blocks])
        self.joined = drawing.request.first + (state.rows if state else 0)  # those before are in the archive to be

    def path(self, rows: range) -> Path:
        return self.folder / f"{rows.start:09d}-{rows.stop:09d}.npy"

    def has(self, rows: range) -> bool:
        return rows.stop <= self.joined or self.path(rows).is_file()

    @contextlib.contextmanager
    def block(self, rows: range) -> Iterator[Callable[[int, Tensor], None]]:
        with npz_blocks.block(self.path(rows), len(rows)) as put:
            yield lambda start, images: put(start - rows.start, self._laid_out(images))

    def _laid_out(self, images: Tensor) -> np.ndarray:
        if self.kind == "arrays":
            return images.numpy()
        return as_bytes(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    def join(self, out: Path, about: dict[str, Any], quiet: bool) -> None:
        """The blocks as one file, which says what drew it, and the blocks gone."""
        r = self.drawing.request
        rows = range(r.first, r.first + r.n)
        labels, scales = self.drawing.labels(rows), self.drawing.scales(rows)
        small = {} if scales is None or self.kind != "arrays" else {"guidance": scales.numpy()}
        if self.kind == "arrays":
            small["labels"] = (torch.zeros(r.n) if labels is None else labels).long().numpy()
        elif labels is not None:
            small["arr_1"] = labels.numpy()
        name, comment = "images" if self.kind == "arrays" else "arr_0", claiming.comment(about, r.n)
        with progress.counting(f"writing {out.name}", r.n, None, quiet) as advance:
            npz_blocks.join([(self.path(rows), len(rows)) for rows in r.blocks], out, name, small, comment, advance)
        shutil.rmtree(self.folder)
