"""The work of a stage: parameters and FLOPs of its networks, and how often each is called for one student image."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import use
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_fast import models
from cmt_fast.config.schema import Dit, Model
from cmt_fast.engine.sharding import StageSize, measure
from cmt_fast.models import dit
from cmt_fast.models.shapes import LightMode
from cmt_fast.models.vgg import LatentVgg, PixelVgg
from cmt_fast.models.weightless import weightless
from cmt_fast.objectives import counting
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.run.resolved import ResolvedStage
from cmt_fast.teacher import pool


class Network(NamedTuple):
    """flops: of one forward of one image; attention: those of them in a DiT's attention; depth 0: not a DiT.

    model: what it was built from, None for a feature network.
    """

    name: str
    parameters: int
    flops: float
    attention: float = 0.0
    width: int = 0
    depth: int = 0
    tokens: int = 0
    heads: int = 1
    model: Model | None = None


class Term(NamedTuple):
    """Work for one student image: `times` of a kind (forward, backward, tangent, input_gradient, recompute) of a network.

    of: student, teacher, guide or features; rows: of one call over all processes, where calls are small, and no more than
    at_once on each of them; why: a phrase; wide: of `times`, those in fp32 whatever the stage's precision is.
    """

    of: str
    kind: str
    times: float
    why: str
    rows: int | None = None
    at_once: int | None = None
    wide: float = 0.0


class Ideas(NamedTuple):
    """What a stage is reckoned with. selective: tangents on rows with r != t alone; cached: trajectories are read from disk.

    host: a step is no shorter than its host takes, where that was measured; without it the GPU's time alone.
    """

    selective: bool = True
    cached: bool = False
    how: str = "fused"
    host: bool = False


OURS = Ideas()
AS_IT_RUNS = Ideas(host=True)


def dit_forward(
    width: int, depth: int, tokens: int, two_times: bool, values: int = 16, features: int = 256
) -> tuple[float, float]:
    """FLOPs of one forward of one image, and those of attention in it. values: of a patch; features: of a time."""
    attention = 4 * tokens**2 * width * depth
    linear = 24 * tokens * width**2 * depth
    times = 2 * (features * width + width**2) * (2 if two_times else 1)
    return linear + attention + 12 * width**2 * depth + 4 * width**2 + times + 4 * values * tokens * width, attention


def network(model: Model, path: str, shape: tuple[int, ...], classes: int, name: str = "") -> Network:
    """A recipe's network, built on shapes alone. Raises ValueError where model and rows do not fit."""
    same = {key: value for key, value in (("checkpoint_activations", False), ("dropout", 0.0)) if hasattr(model, key)}
    return _network(dataclasses.replace(model, **same), path, shape, classes, name)


@functools.lru_cache(maxsize=64)
def _network(model: Model, path: str, shape: tuple[int, ...], classes: int, name: str) -> Network:
    """What `network` gives, once for all models whose forward is the same."""
    make = lambda: models.build(model, path, 0.5, shape, classes)
    if not isinstance(model, Dit) or model.wide_head:
        size = getattr(model, "size", None) or getattr(model, "preset", None) or f"{model.width} x {model.depth}"
        kind = "DiT^DH" if isinstance(model, Dit) else model.kind
        return Network(name or f"{kind}-{size}", *_counted(make, shape, bool(classes)), model=model)
    preset = zip((model.width, model.depth, model.heads), dit.SIZES[model.size])
    width, depth, heads = (given or size for given, size in preset)
    with weightless():
        count = sum(p.numel() for p in make().parameters())
    tokens, features = (shape[1] // model.patch) ** 2, 256 if model.embeddings == "dit" else 64
    work = dit_forward(width, depth, tokens, path == "linear", shape[0] * model.patch**2, features)
    return Network(name or f"DiT-{model.size}/{model.patch}", count, *work, width, depth, tokens, heads, model)


@functools.lru_cache(maxsize=64)
def size(model: Model, path: str, shape: tuple[int, ...], classes: int) -> StageSize:
    """The same network as an engine's sizing counts it."""
    with weightless():
        return measure(models.build(model, path, 0.5, shape, classes))


def dit_network(width: int, depth: int, tokens: int) -> Network:
    """The two-time DiT of these sizes on latents of 4 channels; heads of 64 columns where no published size has others."""
    side = 2 * math.isqrt(tokens)
    return network(dit_model(width, depth), "linear", (4, side, side), 1000)


def dit_model(width: int, depth: int) -> Dit:
    """The model of such a DiT."""
    heads = next((h for w, d, h in dit.SIZES.values() if (w, d) == (width, depth)), max(1, width // 64))
    return Dit(width=width, depth=depth, heads=heads)


@functools.lru_cache(maxsize=16)
def feature_network(distance: str, shape: tuple[int, ...], width: int = 64) -> Network:
    """The network behind a perceptual distance; its five slices. width: of the first stage of a classifier of latents."""
    if distance == "lpips":
        return Network("VGG16", *_counted(PixelVgg, (3, *shape[1:]), None))
    return Network("latent VGG", *_counted(lambda: LatentVgg(shape[0], 1000, width), shape, None))


class _Products(LightMode):
    """Counts the FLOPs of the products that run inside, by torch's own formulas."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self.flops, self.formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, formula = func(*args, **(kwargs or {})), self.formulas.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _counted(make: Callable[[], Any], shape: tuple[int, ...], labelled: bool | None) -> tuple[int, float]:
    """Parameters, and FLOPs of a forward's products, on shapes without numbers; labelled None: of a network's slices."""
    with weightless(), sdpa_kernel(SDPBackend.MATH), use("reference"):
        net = make()
        for module in net.modules():
            if hasattr(module, "folded"):
                module.folded = (
                    True  # the normalisation of weights has no products, and is most of the time that this takes
                )
        with _Products() as counter, torch.no_grad():
            x, t = torch.empty(1, *shape), torch.empty(1)
            if labelled is None:
                net.slices(x)
            else:
                net(x, t, t, torch.empty(1, dtype=torch.int64) if labelled else None)
        count = sum(p.numel() for p in net.parameters())
    return count, float(counter.flops)


# ---------------------------------------------------------------------------------------------- what a stage does


def terms(resolved: ResolvedStage, ideas: Ideas = OURS) -> list[Term]:
    """All network work of a stage for one student image: calls times share of the rows that make them."""
    run, stage = resolved.run, resolved.config
    own, anchored = (rows / stage.batch for rows in resolved.rows)
    o, rows = stage.objective, resolved.rows[0]
    each = counting.work(o, resolved.path, rows)
    trained = own * each.trained + anchored
    out = [Term("student", "forward", trained, "every row"), Term("student", "backward", trained, "every row")]
    if getattr(run.model, "checkpoint_activations", False):
        out.append(Term("student", "recompute", trained, "activations are not kept"))
    if each.plain:
        out.append(Term("student", "forward", own * each.plain, "targets, without a gradient"))
    if each.tangents:
        share = each.tangents if ideas.selective else 1.0
        out.append(Term("student", "tangent", own * share, f"tangents of {share:.3g} of its rows"))
    guide = stage.autoguidance
    if each.teacher:
        calls = own * each.teacher
        out.append(Term("teacher", "forward", calls * (1 if stage.teacher_guidance == 1 else 2), "teacher's step"))
        if guide:
            out.append(Term("guide", "forward", calls, "guide of the teacher's step"))
    points, t = resolved.trajectory_rows, stage.trajectories
    if points and t and not (ideas.cached or t.cache):
        nfe = t.calls
        drawn = pool.drawn(t, run.path, nfe // (2 if t.solver == "heun" else 1))
        rows = max(1, points * (1 if t.mode == "paper" else t.pool_steps) // drawn)
        calls, why = points / stage.batch * nfe / drawn, f"rollouts, {nfe} calls for {drawn} points"
        out.append(Term("teacher", "forward", calls * (2 if t.guided else 1), why, rows, t.rollout_batch))
        if guide and guide.trajectories:
            out.append(Term("guide", "forward", calls, "guide of the rollouts", rows, t.rollout_batch))
    compared = [(o, own), (stage.anchor.objective, anchored)] if stage.anchor else [(o, own)]
    share = sum(
        part
        for objective, part in compared
        if {getattr(objective, key, "") for key in ("distance", "space")} & set(PERCEPTUAL)
    )
    if share:
        out.append(Term("features", "forward", 2 * share, "features of image and target"))
        out.append(Term("features", "input_gradient", share, "their gradient to the image"))
    return out


def calls(resolved: ResolvedStage) -> dict[str, float]:
    """Images, steps and network forwards of a stage (backward counted as two), one whatever the network's size."""
    plan = resolved.schedule
    images = plan.total * plan.batch
    worth = {"forward": 1, "backward": 2, "tangent": 1}
    forwards = sum(t.times * worth.get(t.kind, 0) for t in terms(resolved) if t.of != "features")
    return {"steps": plan.total, "images": images, "forwards": images * forwards}


def flops(kind: str, net: Network) -> float:
    """FLOPs of one piece of work on one image. Of weights that are frozen only the image's gradient is taken, 1 F."""
    each = {"forward": 1, "recompute": 1, "backward": 2, "tangent": 1, "input_gradient": 1}[kind]
    return each * net.flops + (net.attention if kind == "tangent" else 0)


def flops_image(work: list[Term], networks: dict[str, Network]) -> float:
    """FLOPs that the algorithm needs for one student image; recomputed activations are not among them."""
    return sum(t.times * flops(t.kind, networks[t.of]) for t in work if t.kind != "recompute")
