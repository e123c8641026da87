"""Which packaged recipes a checkpoint can be imported with, and the overrides that bring each to the file's network.

A proposal was tried: the recipe with its overrides builds, without memory, a network that has every tensor of the file with
its shape, and makes sense of all its stages.
"""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.config import loading, recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Latents, Run, weighs
from cmt_fast.convert import fitting, importing, telling
from cmt_fast.convert.families import Asks
from cmt_fast.convert.files import Source
from cmt_fast.run import absent, networks
from cmt_fast.run.resolved import resolve

HEADS = "model.heads=HEADS"  # what a file of an unpublished size does not say, for the user to fill in


class Proposal(NamedTuple):
    """A packaged recipe and the overrides with which the file fits it, in the order in which they are to be typed."""

    recipe: str
    overrides: tuple[str, ...]


def propose(source: Source, wanted: str | None = None) -> tuple[str, list[Proposal]]:
    """The file's family, and what it can be imported with: recipes of as many classes first, then by their overrides.

    wanted: its family, where it does not tell. Raises ConfigError where no packaged recipe comes to fit, with the reason of
    the one that came nearest.
    """
    family = telling.find(source, wanted)
    asks, found, near = family.asks(source), [], {}
    for name in recipes.recipes():
        run = loading.load(name)
        if run.pre is None or not isinstance(run.data, Latents) or run.data.expects is None:
            continue
        others = asks.model.get("kind", run.model.kind) != run.model.kind and _others(run)
        if family.path not in (None, run.path) or others:
            continue
        overrides = _overrides(asks, run)
        reason = _refused(source, name, overrides, wanted)
        rank = (run.data.expects.classes != asks.classes, len(overrides), name)
        if reason is None:
            found.append((rank, Proposal(name, tuple(overrides))))
        else:
            near[rank] = " ".join([name, *overrides]) + f": {reason}"
    if not found:
        nearest = near[min(near)] if near else "none is of its path"
        raise ConfigError(
            f"FILE: {str(source.path)!r} is of the family {family.name} and fits no packaged recipe; nearest is {nearest}"
        )
    return family.name, [proposal for _, proposal in sorted(found)]


def _others(run: Run) -> bool:
    """Whether stages of the recipe name networks of other runs, which are of the recipe's own kind and data."""
    return any("/" in name for stage in run.stages for name in resolve(run, stage).called.values())


def _overrides(asks: Asks, run: Run) -> list[str]:
    """What brings the recipe to the file, its store taken as absent: what it expects can be said, what it holds cannot."""
    assert isinstance(run.data, Latents) and run.data.expects is not None
    out = []
    kind = asks.model.get("kind", run.model.kind)
    if kind != run.model.kind:  # the keys of the recipe's model are another kind's
        out.append(f"model={{kind: {kind}}}")
        run = loading.build({**loading.dump(run), "model": {"kind": kind}})
    more = fitting.suggestions(asks, run, absent.AbsentRows(run.data))
    if kind == "dit" and asks.model.get("heads") is None and any(o.startswith("model.width=") for o in more):
        more.append(HEADS)
    shape = (asks.channels, asks.side, asks.side) if asks.channels and asks.side else run.data.expects.shape
    return out + more + [o for name in run.stages for o in _stage(run, name, kind, shape)]


def _stage(run: Run, name: str, kind: str, shape: tuple[int, ...]) -> list[str]:
    """What of a stage another kind of network or other rows cannot do: learned weights, augmentations, distances of photos."""
    stage, out = run.stages[name], []
    if getattr(stage.objective, "uncertainty", False) and not (kind == run.model.kind and weighs(run.model)):
        out.append(f"{name}.objective.uncertainty=false")
    if stage.augment and kind != "edm":
        out.append(f"{name}.augment=null")
    if "lpips" in stage.distances() and (shape[0] not in (1, 3) or min(shape[1:]) < 16):
        parts = [("objective", stage.objective)] + (
            [("anchor.objective", stage.anchor.objective)] if stage.anchor else []
        )
        out += [f"{name}.{key}.distance=l2" for key, part in parts if getattr(part, "distance", "") == "lpips"]
        out.append(f"{name}.perceptual=null")
    return out


def _refused(source: Source, name: str, overrides: list[str], wanted: str | None) -> str | None:
    """Why the file does not fit the recipe with these overrides; None where it does."""
    width = source.tensors["x_embedder.proj.weight"].shape[0] if HEADS in overrides else 0
    tried = [o if o != HEADS else f"model.heads={max(width // 8, 1)}" for o in overrides]  # no shape depends on it
    try:
        run = loading.load(name, tried)
        assert isinstance(run.data, Latents)
        data = absent.AbsentRows(run.data)
        networks.check(run, data.shape, data.classes)
        parity = importing.match(source, run, data, wanted)
    except ValueError as error:  # ConfigError is one
        return str(error)
    return None if parity.fits else importing.first(parity)
