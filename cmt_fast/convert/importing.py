"""A public checkpoint becomes the finished stage `pre` of a run, and a parity report says what of it fits where.

The file's tensors are renamed by its family's map (names.py) and compared with the network that the recipe builds: every
tensor of the network must be there with its shape. Shapes are compared first, without numbers on either side; only a file
that fits is read. What the file has besides is named with the reason why it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config import fingerprint
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.convert import fitting, telling
from cmt_fast.convert.families import Family
from cmt_fast.convert.files import Source
from cmt_fast.data.rows import Rows
from cmt_fast.models.weightless import weightless
from cmt_fast.run import absent, networks
from cmt_fast.run.absent import AbsentRows
from cmt_fast.run.workspace import Workspace
from cmt_fast.safe_pickle.opcodes import shown
from cmt_fast.storage import checkpoint

FIRST = 5  # names shown of a long list


class Parity(NamedTuple):
    """How a file fits a network. weights: by our names, fp32; skipped: the file's name -> why; shapes: name, file's, ours.

    null_class: whether no label was trained beside the labels, None where the file does not say. Of a file that does not fit
    the weights are shapes alone, on the meta device.
    """

    family: str
    weights: dict[str, Tensor]
    skipped: dict[str, str]
    missing: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    conflicts: list[str]
    notes: list[str]
    suggestions: list[str]
    null_class: bool | None = None

    @property
    def fits(self) -> bool:
        """Whether every tensor of the network is in the file with its shape, and was trained for what the recipe does."""
        return not (self.missing or self.shapes or self.conflicts)


def rows(source: Source, run: Run, wanted: str | None = None) -> Rows:
    """A run's data or, where its store is not here, what its recipe expects of it; classes that it leaves open are the file's.

    Raises ValueError and ConfigError as `data.datasets.load` and `compare` do.
    """
    found = absent.rows(run)
    if not isinstance(found, AbsentRows) or "classes" in found.known:
        return found
    family = telling.find(source, wanted)
    return absent.rows(run, family.asks(source).classes or 0)


def compare(source: Source, run: Run, data: Rows, wanted: str | None = None) -> Parity:
    """How the file fits the network that the recipe builds, with its weights if it does. wanted: its family, if asked for.

    Raises ConfigError for a file of no known family.
    """
    found = match(source, run, data, wanted)
    if not found.fits:
        return found
    theirs = _renamed(source, telling.KNOWN[found.family], _wide(source.tensors))[0]
    given = lambda name, like: theirs[name] if name in theirs else torch.zeros(like.shape)
    weights = {name: given(name, like).to(like.dtype).contiguous() for name, like in found.weights.items()}
    return found._replace(weights=weights, notes=[*found.notes, *_numbers(source, weights)])


def match(source: Source, run: Run, data: Rows, wanted: str | None = None) -> Parity:
    """As `compare`, by names and shapes alone: no number of the file is looked at, and no network takes memory."""
    family = telling.find(source, wanted)
    with weightless():
        own = networks.fresh_network(run, data.shape, data.classes).state_dict()
    asks = family.asks(source)
    shapeless = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in source.tensors.items()}
    theirs, skipped = _renamed(source, family, _wide(shapeless))
    weights, shapes = {}, []
    for name, tensor in theirs.items():
        if name not in own:
            skipped[name] = "the network of this recipe has no such tensor"
        elif tensor.shape != own[name].shape:
            shapes.append((name, tuple(tensor.shape), tuple(own[name].shape)))
        else:
            weights[name] = torch.empty(tensor.shape, dtype=own[name].dtype, device="meta")
    missing = sorted(own.keys() - theirs.keys())
    notes = [*source.notes, *asks.notes, *fitting.doubts(asks, run), *fitting.normalisation(asks, data)]
    begins = [name for name in missing if name.startswith("net.log_variance.")] if run.model.kind != "edm2" else []
    if begins:  # a head of ours alone, which starts at 0 wherever it starts
        missing = [name for name in missing if name not in begins]
        weights |= {name: torch.empty_like(own[name], device="meta") for name in begins}
        notes.append("the log variance, which the file has not, begins at 0")
    against, hints = fitting.conflicts(source, family, asks, run, data), fitting.suggestions(asks, run, data)
    return Parity(family.name, weights, skipped, missing, shapes, against, notes, hints, asks.null_class)


def _renamed(source: Source, family: Family, theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors by our names, and those left out. Raises ConfigError for what is not of the family."""
    try:
        return family.rename(theirs)
    except ValueError as error:
        raise ConfigError(
            f"FILE: {str(source.path)!r} looks like {family.name}, but {shown(str(error), 200)}"
        ) from None


def _wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Halves as fp32, which is exact, before a map computes with them."""
    return {k: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for k, t in tensors.items()}


def _numbers(source: Source, weights: dict[str, Tensor]) -> list[str]:
    """What happened to the numbers on their way into fp32. Raises ConfigError when they are not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"FILE: {str(source.path)!r}: {shown(name)} is not finite")
    kinds = {str(t.dtype).removeprefix("torch.") for t in source.tensors.values() if t.is_floating_point()}
    rounded = " (float64 is rounded, narrower kinds are exact)" if "float64" in kinds else " exactly"
    return [f"the file's {' and '.join(sorted(kinds))} became float32{rounded}"] if kinds - {"float32"} else []


def write(source: Source, parity: Parity, work: Workspace) -> Path:
    """Make the run's folder and its finished stage `pre`; returns the stage's folder.

    Raises ConfigError where the file does not fit, or the folder has a stage `pre` or another configuration.
    """
    stage = work.folder / "pre"
    if not parity.fits:
        hint = f"; try {' '.join(parity.suggestions)}" if parity.suggestions else ""
        raise ConfigError(
            f"FILE: {str(source.path)!r} does not fit the recipe: {len(parity.missing)} tensors missing, "
            f"{len(parity.shapes)} of another shape; first: {first(parity)}{hint}"
        )
    if checkpoint.steps(stage):
        raise ConfigError(f"--out: {stage} holds checkpoints already; choose another folder")
    with work.lock():
        work.claim()
        about = {
            "stage": "pre",
            "nimg": 0,
            "done": True,
            "recipe": work.run.name,
            "config": fingerprint.stage_digest(work.run, "pre"),
            "parent": lineage(source, parity),
            "wall": {"train_s": 0.0, "eval_s": 0.0},
        }
        tracks = {f"ema-{i}": parity.weights for i in range(len(work.run.pre.ema))}
        checkpoint.save(stage, 0, {"model": parity.weights, **tracks}, about)
    return stage


def first(parity: Parity) -> str:
    """The first thing that keeps a file from fitting."""
    return [*parity.conflicts, *parity.missing, *(f"{n} is {a}, not {b}" for n, a, b in parity.shapes)][0]


def lineage(source: Source, parity: Parity) -> dict[str, Any]:
    """What the manifest of `pre`, and of all that is trained from it, says of the file."""
    about = source.about
    return {
        "stage": "import",
        "step": 0,
        "nimg": 0,
        "config": None,
        "ema": source.sha256,
        "parent": _chain((about.get("cmt") or {}).get("lineage")),
        "file": source.path.name,
        "sha256": source.sha256,
        "family": parity.family,
        "kind": source.kind,
        "entry": source.entry,
        "class": about.get("class"),
        "source_sha256": about.get("source_sha256"),
        "init_kwargs": about.get("init_kwargs") or about.get("args"),
        "encoder": about.get("encoder"),
        "skipped": sorted(parity.skipped),
        "null_class": parity.null_class,
    }


def _chain(node: Any, depth: int = 0) -> dict[str, Any] | None:
    """The lineage in a file of ours, which anybody may have written: numbers and short text, by the keys that are read."""
    if not isinstance(node, dict) or depth > 20:
        return None
    number = lambda key: v if type(v := node.get(key)) is int and v >= 0 else 0
    word = lambda key: shown(v) if isinstance(v := node.get(key), str) else None
    out: dict[str, Any] = {"stage": word("stage") or "import", "step": number("step"), "nimg": number("nimg")}
    out |= {"config": word("config"), "ema": word("ema") or ""}
    if "file" in node:
        out |= {key: word(key) or "" for key in ("file", "sha256", "family", "kind", "entry")}
        out["null_class"] = null if isinstance(null := node.get("null_class"), bool) else None
    return {**out, "parent": _chain(node.get("parent"), depth + 1)}


def text(source: Source, parity: Parity) -> str:
    """The parity report, for the terminal."""
    where = f"entry {source.entry!r} of {', '.join(source.entries)}" if source.entry else "one network"
    parameters = sum(math.prod(t.shape) for t in parity.weights.values() if t.is_floating_point())
    lines = [
        f"{source.path.name}: {source.kind}, {where}" + (f", sha256 {source.sha256[:16]}..." if parity.fits else ""),
        f"family {parity.family}: {len(parity.weights)} tensors matched ({parameters:,} numbers), {len(parity.skipped)} skipped, "
        f"{len(parity.missing)} missing, {len(parity.shapes)} of another shape",
    ]
    lines += _list("conflict", parity.conflicts, str)
    lines += _list("missing", parity.missing, str)
    lines += _list("shape", parity.shapes, lambda s: f"{s[0]}: {s[1]} in the file, {s[2]} in the network")
    lines += _list("skipped", list(parity.skipped.items()), lambda s: f"{shown(s[0])}: {s[1]}")
    known = source.about.get("init_kwargs") or source.about.get("args") or {}
    if known:
        lines.append("built with: " + ", ".join(f"{k} {shown(str(v))}" for k, v in known.items()))
    return "\n".join(lines + [f"note: {n}" for n in parity.notes])


def _list(title: str, items: list, say: Callable[[Any], str]) -> list[str]:
    rest = [f"{title}: and {len(items) - FIRST} more"] if len(items) > FIRST else []
    return [f"{title}: {say(item)}" for item in items[:FIRST]] + rest
