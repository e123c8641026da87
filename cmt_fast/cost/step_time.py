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

import math
from typing import NamedTuple

from cmt_fast.cost.flops import Network, Term, flops
from cmt_fast.cost.hardware import Card

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
    rows = min(term.at_once or term.rows, max(1, term.rows // processes))
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
    wire = card.link if processes <= card.per_machine else min(card.link, card.per_machine * card.network)
    return 1e6 * sent_bytes(zero, parameters, sharded, processes, passes) / wire


def sent_bytes(zero: int | None, parameters: int, sharded: int, processes: int, passes: int) -> float:
    """Bytes a step that one process sends, as `communication_us` has them."""
    gathered = 8 * passes if zero == 3 else 4
    return ((4 + gathered) * parameters + 4 * sharded) * (processes - 1) / processes
