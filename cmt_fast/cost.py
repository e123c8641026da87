"""What training costs: FLOPs of a network and of a stage, and the time they take on a card. Arithmetic; nothing is run.

FLOP = 2 x multiply-add. A DiT of T tokens, width D and L blocks on patches of V values, one image, one forward:

    linear       24 T D^2 L                              qkv 6, projection 2, MLP 16
    attention    4 T^2 D L                               two products
    conditioning 12 D^2 L + 4 D^2 + 2 (N D + D^2) [x 2 with an embedding of t - r], N features of a time
    patches      4 V T D
    F            their sum

Other networks are counted product by product on shapes alone. Backward 2 F; a tangent beside its forward F + attention.

Time of a DiT: products at a share of the card's large matmul (by width), attention at the rates of flash kernels,
elementwise work as passes over U = T D values at the card's copy rate. Shares, rates and passes were read off counts on a
CPU and published timings; no GPU has run them here: they predict. Other networks: one share of the datasheet's rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cmt_kernels import use

from cmt_fast import models, stages, trajectories
from cmt_fast.cards import Card
from cmt_fast.models import dit
from cmt_fast.models.vgg import LatentVgg, PixelVgg
from cmt_fast.objectives import ROWS
from cmt_fast.objectives.distance import PERCEPTUAL
from cmt_fast.schema import Dit, Model, Run

GEMM = (
    (0, 0.0),
    (768, 0.70),
    (1024, 0.78),
    (1152, 0.82),
)  # width, share of a large matmul's rate that its products reach
SHARE = {"bf16": 0.3, "tf32": 0.3, "fp32": 0.6}  # of the datasheet's rate, for networks without a model of their passes
FILL = ((512, 0.48), (8192, 0.85))  # tokens of a call, share of the card that its products' tiles fill
# TFLOP/s of attention on an H100 in bf16 at 256 and 1024 tokens; math: products and softmax apart, as func.jvp needs them
FLASH = {"forward": (200, 330), "backward": (160, 270), "dual": (190, 330), "math": (83, 105)}


class Passes(NamedTuple):
    """Passes over a block's U in forward, backward and dual forward; bytes a parameter of optimizer, clipping and EMA, and
    those that each further EMA track adds."""

    forward: float
    backward: float
    dual: float
    optimizer: float
    track: float


# eager: torch op by op, tangents by func.jvp (20 T heads / D more passes); fused: the ops of cmt_kernels; fused+epilogues:
# were their bias and GELU in the products' epilogues, which they are not
PASSES = {
    "eager": Passes(30, 71, 232, 116, 20),
    "compile": Passes(20, 52, 47, 76, 12),
    "fused": Passes(16, 27, 32, 38, 8),
    "fused+epilogues": Passes(12, 19, 24, 38, 8),
}


class Network(NamedTuple):
    """flops: of one forward of one image; attention: those of them in a DiT's attention; depth 0: not a DiT."""

    name: str
    parameters: int
    flops: float
    attention: float = 0.0
    width: int = 0
    depth: int = 0
    tokens: int = 0
    heads: int = 1


class Term(NamedTuple):
    """Work for one student image: `times` of a kind (forward, backward, tangent, input_gradient, recompute) of a network.

    of: student, teacher, guide or features; rows: of one call over all processes, where calls are small; why: a phrase.
    """

    of: str
    kind: str
    times: float
    why: str
    rows: int | None = None


class Ideas(NamedTuple):
    """What a stage is reckoned with. selective: tangents on rows with r != t alone; cached: trajectories are read from disk."""

    selective: bool = True
    cached: bool = False
    how: str = "fused"


OURS = Ideas()


def dit_forward(
    width: int, depth: int, tokens: int, two_times: bool, values: int = 16, features: int = 256
) -> tuple[float, float]:
    """FLOPs of one forward of one image, and those of attention in it. values: of a patch; features: of a time."""
    attention = 4 * tokens**2 * width * depth
    linear = 24 * tokens * width**2 * depth
    times = 2 * (features * width + width**2) * (2 if two_times else 1)
    return linear + attention + 12 * width**2 * depth + 4 * width**2 + times + 4 * values * tokens * width, attention


@functools.lru_cache(maxsize=64)
def network(model: Model, path: str, shape: tuple[int, ...], classes: int, name: str = "") -> Network:
    """A recipe's network, built on shapes alone. Raises ValueError where model and rows do not fit."""
    make = lambda: models.build(model, path, 0.5, shape, classes)
    if not isinstance(model, Dit):
        size = getattr(model, "size", None) or getattr(model, "preset", None) or f"{model.width} x {model.depth}"
        return Network(name or f"{model.kind}-{size}", *_counted(make, shape, bool(classes)))
    preset = zip((model.width, model.depth, model.heads), dit.SIZES[model.size])
    width, depth, heads = (given or size for given, size in preset)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        count = sum(p.numel() for p in make().parameters())
    tokens, features = (shape[1] // model.patch) ** 2, 256 if model.embeddings == "dit" else 64
    work = dit_forward(width, depth, tokens, path == "linear", shape[0] * model.patch**2, features)
    return Network(name or f"DiT-{model.size}/{model.patch}", count, *work, width, depth, tokens, heads)


def dit_network(width: int, depth: int, tokens: int) -> Network:
    """The two-time DiT of these sizes on latents of 4 channels; heads of 64 columns where no published size has others."""
    heads = next((h for w, d, h in dit.SIZES.values() if (w, d) == (width, depth)), max(1, width // 64))
    side = 2 * math.isqrt(tokens)
    return network(Dit(width=width, depth=depth, heads=heads), "linear", (4, side, side), 1000)


@functools.lru_cache(maxsize=16)
def feature_network(distance: str, shape: tuple[int, ...], width: int = 64) -> Network:
    """The network behind a perceptual distance; its five slices. width: of the first stage of a classifier of latents."""
    if distance == "lpips":
        return Network("VGG16", *_counted(PixelVgg, (3, *shape[1:]), None))
    return Network("latent VGG", *_counted(lambda: LatentVgg(shape[0], 1000, width), shape, None))


def _counted(make: Callable[[], Any], shape: tuple[int, ...], labelled: bool | None) -> tuple[int, float]:
    """Parameters, and FLOPs of a forward's products, on shapes without numbers; labelled None: of a network's slices."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), use("reference"), torch.random.fork_rng(devices=[]):
        net = make()
        for module in net.modules():
            if hasattr(module, "folded"):
                module.folded = (
                    True  # the normalisation of weights has no products, and is most of the time that this takes
                )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x, t = torch.zeros(1, *shape), torch.ones(1)
            if labelled is None:
                net.slices(x)
            else:
                net(x, t, t, torch.zeros(1, dtype=torch.int64) if labelled else None)
        count = sum(p.numel() for p in net.parameters())
    return count, float(counter.get_total_flops())


# ---------------------------------------------------------------------------------------------- what a stage does


def terms(run: Run, name: str, ideas: Ideas = OURS) -> list[Term]:
    """All network work of a stage for one student image: calls times share of the rows that make them."""
    stage = run.stage(name)
    assert stage is not None
    own, anchored = (rows / stage.batch for rows in stages.rows(stage))
    o, needs = stage.objective, ROWS[stage.objective.kind]
    out = [Term("student", "forward", 1.0, "every row"), Term("student", "backward", 1.0, "every row")]
    if getattr(run.model, "checkpoint_activations", False):
        out.append(Term("student", "recompute", 1.0, "activations are not kept"))
    if needs.forwards > 3:
        tangents = o.kind in ("sct", "scd")
        out.append(Term("student", "tangent" if tangents else "forward", own, "tangents" if tangents else "target"))
    if o.kind in ("meanflow", "imeanflow"):
        guided = (o.omega, o.kappa) != (1.0, 0.0)
        share = o.ratio if ideas.selective else 1.0
        out.append(Term("student", "tangent", own * share, "rows with r < t" if ideas.selective else "all rows"))
        if guided:
            out.append(Term("student", "forward", own, "guidance without label"))
        if o.kind == "imeanflow" or (guided and o.kappa):
            out.append(Term("student", "forward", own * o.ratio, "u(z, t, t) on rows with r < t"))
    guide = stage.autoguidance
    if needs.teacher:
        calls = own * (2 if o.kind == "ecd" and o.step == "heun" else 1)
        out.append(Term("teacher", "forward", calls * (1 if stage.teacher_guidance == 1 else 2), "teacher's step"))
        if guide:
            out.append(Term("guide", "forward", calls, "guide of the teacher's step"))
    points, t = stages.trajectory_rows(stage), stage.trajectories
    if points and t and not (ideas.cached or t.cache):
        nfe = t.calls
        each = trajectories.drawn(t, run.path, nfe // (2 if t.solver == "heun" else 1))
        rows = max(1, points * (1 if t.mode == "paper" else t.pool_steps) // each)
        calls, why = points / stage.batch * nfe / each, f"rollouts, {nfe} calls for {each} points"
        out.append(Term("teacher", "forward", calls * (1 if t.guidance == 1 else 2), why, rows))
        if guide and guide.trajectories:
            out.append(Term("guide", "forward", calls, "guide of the rollouts", rows))
    compared = [(o, own), (stage.anchor.objective, anchored)] if stage.anchor else [(o, own)]
    share = sum(part for objective, part in compared if getattr(objective, "distance", "") in PERCEPTUAL)
    if share:
        out.append(Term("features", "forward", 2 * share, "features of image and target"))
        out.append(Term("features", "input_gradient", share, "their gradient to the image"))
    return out


def calls(run: Run, name: str) -> dict[str, float]:
    """Images, steps and network forwards of a stage (backward counted as two), one whatever the network's size."""
    plan = stages.schedule(run.stage(name))
    images = plan.total * plan.batch
    worth = {"forward": 1, "backward": 2, "tangent": 1}
    forwards = sum(t.times * worth.get(t.kind, 0) for t in terms(run, name) if t.of != "features")
    return {"steps": plan.total, "images": images, "forwards": images * forwards}


def flops(kind: str, net: Network) -> float:
    """FLOPs of one piece of work on one image. Of weights that are frozen only the image's gradient is taken, 1 F."""
    each = {"forward": 1, "recompute": 1, "backward": 2, "tangent": 1, "input_gradient": 1}[kind]
    return each * net.flops + (net.attention if kind == "tangent" else 0)


def flops_image(work: list[Term], networks: dict[str, Network]) -> float:
    """FLOPs that the algorithm needs for one student image; recomputed activations are not among them."""
    return sum(t.times * flops(t.kind, networks[t.of]) for t in work if t.kind != "recompute")


# ---------------------------------------------------------------------------------------------- how long it takes


def microseconds(kind: str, net: Network, card: Card, how: str, precision: str) -> tuple[float, str]:
    """Time of one piece of work on one image in a large batch, and the arithmetic behind it."""
    if not net.depth:
        rate = SHARE[precision] * card.peak[precision]
        text = f"{flops(kind, net) / 1e9:,.1f} GFLOP / ({SHARE[precision]} x {card.peak[precision] / 1e12:.4g} TFLOP/s)"
        return 1e6 * flops(kind, net) / rate, text
    if kind == "tangent":
        (dual, text), (plain, _) = (microseconds(k, net, card, how, precision) for k in ("dual", "forward"))
        return dual - plain, f"dual ({text}) - forward {plain:,.0f} us"
    p, by_math = PASSES[how], how == "eager" and kind == "dual"
    # linear products, attention's, its padding of a head, its rate, passes over U
    linear, attention, pad, rate, passes = {
        "forward": (1, 1.0, 32, "forward", p.forward),
        "recompute": (1, 1.0, 32, "forward", p.forward),
        "backward": (2, 2.5, 32, "backward", p.backward),  # flash computes q k^T once more
        "dual": (2, 3.0, 1 if by_math else 16, "math" if by_math else "dual", p.dual),
    }[kind]
    if by_math:
        passes += 20 * net.tokens * net.heads / net.width
    head = net.width // net.heads
    padded = attention * math.ceil(head / pad) * pad / head
    wide = 2 if precision == "bf16" else 4
    u = net.tokens * net.width * wide
    gemm = gemm_share(net.width, card) * card.matmul[precision]
    flash = _at(net.tokens, FLASH[rate]) * 1e12 * card.flash * card.matmul[precision] / card.matmul["bf16"]
    us = 1e6 * (linear * (net.flops - net.attention) / gemm + padded * net.attention / flash)
    text = (
        f"{linear} x {(net.flops - net.attention) / 1e9:,.4g} GFLOP / ({gemm_share(net.width, card):.3g} x "
        f"{card.matmul[precision] / 1e12:.3g} TFLOP/s) + {padded:.3g} x {net.attention / 1e9:,.3g} GFLOP / "
        f"{flash / 1e12:.3g} TFLOP/s + {passes:.4g} x {net.depth} blocks x {u / 1e6:.3g} MB / {card.copy / 1e12:.3g} TB/s"
    )
    return us + 1e6 * passes * net.depth * u / card.copy, text


def gemm_share(width: int, card: Card) -> float:
    """The share of a large matmul's rate that a DiT's linear layers reach; straight lines between the known widths."""
    for (a, low), (b, high) in zip(card.gemm, card.gemm[1:]):
        if width <= b:
            return low + (high - low) * (width - a) / (b - a)
    return card.gemm[-1][1]


def _at(tokens: int, rates: tuple[float, float]) -> float:
    """Between 256 and 1024 tokens by the logarithm of their number, outside as at the nearer end."""
    part = min(1.0, max(0.0, math.log(tokens / 256) / math.log(4)))
    return rates[0] + part * (rates[1] - rates[0])


def call_us(term: Term, net: Network, us: float, card: Card, precision: str, processes: int) -> tuple[float, str]:
    """What small calls add to a term of `us` an image: microseconds a student image, and the arithmetic.

    A DiT's products fill less of the card (FILL); another network reads all its weights in each call, whatever its rows.
    Launches are not counted.
    """
    if not term.rows:
        return 0.0, ""
    rows = max(1, term.rows // processes)
    if net.depth:
        (few, low), (many, high) = FILL
        part = min(1.0, max(0.0, math.log(rows * net.tokens / few) / math.log(many / few)))
        share = low + part * (high - low)
        return term.times * us * (high / share - 1), f" x {high:.3g}/{share:.3g} at {rows} rows a call"
    nbytes = net.parameters * (2 if precision == "bf16" else 4)
    text = f" + {nbytes / 1e9:.3g} GB of weights / {card.copy / 1e12:.3g} TB/s / {rows} rows a call"
    return 1e6 * term.times * nbytes / card.copy / rows, text


def optimizer_us(parameters: int, tracks: int, card: Card, how: str, parts: int) -> float:
    """Microseconds a step of optimizer, clipping and EMA; parts: processes that share it."""
    p = PASSES[how]
    return 1e6 * (p.optimizer + p.track * (tracks - 1)) * parameters / parts / card.copy


def communication_us(zero: int | None, parameters: int, sharded: int, card: Card, processes: int, passes: int) -> float:
    """Microseconds a step that a process sends, in rings, none of it hidden behind work: at most so long.

    Bytes, over (N - 1)/N: gradients are reduced, 4 P, and weights gathered, 4 P, a step; at stage 3 weights are gathered
    for each pass's forward and backward, 8 P a pass. `sharded`: parameters of a sharded teacher times its calls. Beyond one
    machine the rings leave it by all its network cards.
    """
    if processes == 1:
        return 0.0
    gathered = 8 * passes if zero == 3 else 4
    sent = (4 + gathered) * parameters + 4 * sharded
    wire = card.link if processes <= card.per_machine else min(card.link, card.per_machine * card.network)
    return 1e6 * sent * (processes - 1) / processes / wire
