"""No kernel of attention computes a shape on a GPU before it has agreed with float64 there.

A compiler may be wrong about one shape alone (ptxas 12.8.93 was, by 7 to 50 %, at T < 100), and no test without the card
sees that. So at the first use of a launch, which is everything that its code depends on (shape, dtype, strides,
alignment, with a tangent or without), `examine` puts a few random rows of that layout through the kernels. Where they are
wrong the next of `triton_launches.candidates` is tried, and then holds for all launches of the shape, so that a Dual's value
stays bitwise the plain one; where none is right the op is plain torch. A line says so each time.

Verdicts are kept in ~/.cache/cmt_fast/attention_proofs.json under the card, the versions of torch, Triton and its
assembler, and the kernels' source. Ranks choose alike (agreement.py). Inside a captured graph nothing can be proven: a
graph's warm-up comes first and proves, and a launch that nobody has proven is plain torch in that graph.

What this cannot show: a kernel that is right by luck, as one that reads an undefined register may be. That is for the
gate of the compiled code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cmt_kernels import remembered
from cmt_kernels.attention import agreement, triton_launches
from cmt_kernels.attention.examine import Sample, Verdict, draw, examine, layout

Tiles = dict[str, dict[str, int]]  # kernel -> blocks, warps and stages
FILE = "attention_proofs.json"
SHAPE = 6  # a launch is (kind, T, H, d, dtype, device index), its shape, and the layouts

_settled: dict[tuple[bool, tuple], tuple[int, Tiles | None]] = {}  # (alone, launch) -> candidate, its tiles
_current: dict[tuple, int] = {}  # shape -> the candidate that holds for all its launches
_verdicts: dict[tuple[str, int], Verdict] = {}  # (label of a launch, candidate)
_lines: dict[str, str] = {}  # label of a launch -> what was decided
_lock = threading.RLock()
_thread = threading.local()


class Capturing(Exception):
    """A verdict is asked for inside a captured graph."""


def needed(qkv: Tensor) -> bool:
    """Whether kernels on this device are compiled: the interpreter's are what their source says."""
    return qkv.is_cuda


def capturing(qkv: Tensor) -> bool:
    """Whether the current stream is being captured."""
    return qkv.is_cuda and torch.cuda.is_current_stream_capturing()


def choose(kind: str, qkv: Tensor, other: Tensor | None) -> Tiles | None:
    """The tiles with which `triton_launches.forward` or `triton_launches.backward` is right here; None: plain torch.

    kind: "forward" (other: the tangent or None) or "backward" (other: do). A dictionary is read after the first use.
    """
    if other is not None and not len(other):
        other = None
    _, t, _, h, d = qkv.shape
    launch = (kind, t, h, d, qkv.dtype, qkv.device.index, layout(qkv), None if other is None else layout(other))
    own = getattr(_thread, "alone", False)
    found = _settled.get((False, launch)) or (_settled.get((True, launch)) if own else None)
    if found is None or found[0] < _current.get(launch[:SHAPE], 0):
        with _lock:
            found = _decide(launch, qkv, other, own)
    return found[1]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread's decisions are this rank's own: for calls that ranks need not make alike (`primal`)."""
    before, _thread.alone = getattr(_thread, "alone", False), True
    try:
        yield
    finally:
        _thread.alone = before


def table() -> dict[str, str]:
    """Launch -> what was decided of it in this process, to be stored with a run."""
    return dict(_lines)


def spent() -> dict[str, float]:
    """Launch -> milliseconds that comparing its candidates took, compiling them left out; a verdict that was remembered
    counts what it took when it was made."""
    found: dict[str, float] = {}
    for (label, _), verdict in list(_verdicts.items()):
        found[label] = found.get(label, 0.0) + verdict.ms
    return found


def prove(
    t: int, h: int, d: int, dtype: torch.dtype, dual: bool = False, device: str | torch.device = "cuda"
) -> dict[str, list[Verdict]]:
    """Verdicts of every candidate, made now and kept nowhere, under "forward" and "backward": what a sweep calls.

    For contiguous tensors, qkv (2, t, 3, h, d), with a tangent if dual. In use is the first candidate that is right.
    """
    qkv = torch.zeros(2, t, 3, h, d, dtype=dtype, device=device)
    others = {"forward": qkv[:1] if dual else None, "backward": qkv.new_zeros(2, t, h * d)}
    found = {}
    for kind, other in others.items():
        sample = draw(kind, qkv, other)
        found[kind] = [
            examine(sample, triton_launches.runner(kind, tiles))
            for tiles in triton_launches.candidates(kind, d, dtype, t)
        ]
    return found


def refusal(qkv: Tensor) -> str | None:
    """Why a plain call like this one is plain torch, None if a kernel computes it. Proves if nobody has."""
    return None if choose("forward", qkv, None) is not None else _lines[_label("forward", qkv, None)]


def _label(kind: str, qkv: Tensor, other: Tensor | None) -> str:
    """A launch in words, the same on every rank: what is not said is contiguous and aligned."""
    _, t, _, h, d = qkv.shape
    words = [f"attention {kind} T{t} H{h} d{d} {str(qkv.dtype).removeprefix('torch.')}"]
    words += ["tangent"] if other is not None and kind == "forward" else []
    for name, x in (("qkv", qkv), ("do" if kind == "backward" else "qkv_dot", other)):
        if x is not None and layout(x) != layout(torch.empty_like(x, memory_format=torch.contiguous_format)):
            words.append(f"{name} {','.join(map(str, layout(x)))}")
    return " ".join(words)


@functools.lru_cache
def _machine(device: torch.device) -> str:
    """What a verdict is true for besides the launch and its tiles."""
    sources = b"".join(
        Path(__file__).with_name(name).read_bytes() for name in ("triton_launches.py", "triton_kernels.py")
    )
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch {torch.__version__}, {triton_launches.versions(device)}"
    return f"{card}, {versions}, kernels {hashlib.sha256(sources).hexdigest()[:12]}"


class _Launch:
    """The candidates of one launch, and what is known of each: in this process, in the file, or found out now."""

    def __init__(self, kind: str, qkv: Tensor, other: Tensor | None):
        self.kind, self.qkv, self.other = kind, qkv, other
        self.listed = triton_launches.candidates(kind, qkv.shape[4], qkv.dtype, qkv.shape[1])
        self.label = _label(kind, qkv, other)
        self.sample: Sample | None = None

    def first_right(self, at: int) -> int:
        """The first candidate from `at` on that is right; their count if none is."""
        return next((i for i in range(at, len(self.listed)) if self.verdict(i).right), len(self.listed))

    def verdict(self, i: int) -> Verdict:
        """Raises Capturing where it would have to be found out inside a captured graph."""
        if (self.label, i) not in _verdicts:
            title, file = f"{self.label} {json.dumps(self.listed[i])}", remembered.path(FILE)
            found = _parse(remembered.read(file, _machine(self.qkv.device)).get(title))
            if found is None:
                if capturing(self.qkv):
                    raise Capturing
                found = self.find_out(i)
                remembered.keep(file, _machine(self.qkv.device), title, asdict(found))
            _verdicts[self.label, i] = found
        return _verdicts[self.label, i]

    def find_out(self, i: int) -> Verdict:
        """Examine a candidate, on the sample that all of them share."""
        with torch.no_grad(), torch.autocast(self.qkv.device.type, enabled=False):
            self.sample = self.sample or draw(self.kind, self.qkv, self.other)
            return examine(self.sample, triton_launches.runner(self.kind, self.listed[i]))

    def line(self, at: int, chosen: int) -> str:
        """What was decided and why."""
        wrong = [f"tiles {i}: {v}" for i in range(at, chosen) if not (v := self.verdict(i)).right]
        if chosen > at and not wrong:
            wrong = [f"tiles {at} to {chosen - 1} are right here, but another rank rejects them"]
        if chosen == len(self.listed):
            return f"{self.label}: " + "; ".join([*wrong, "plain torch computes it"])
        v = self.verdict(chosen)
        return f"{self.label}: " + "; ".join(
            [*wrong, f"tiles {chosen} used, error {max(v.errors.values()):.1e} of {v.allowed:.1e}, {v.ms:.0f} ms"]
        )


def _decide(launch: tuple, qkv: Tensor, other: Tensor | None, own: bool) -> tuple[int, Tiles | None]:
    """Settle a launch: look or find out, agree, say so."""
    case, shape = _Launch(launch[0], qkv, other), launch[:SHAPE]
    if not qkv.numel():
        return 0, case.listed[0]  # nothing will run, and nothing is proven
    if not needed(qkv):
        return _settled.setdefault((own, launch), (0, case.listed[0]))
    at = _current.get(shape, 0)
    try:
        chosen = case.first_right(at)
        if not own:
            chosen = agreement.agree(f"{case.label} from {at}", chosen, case.first_right)
            _current[shape] = chosen
    except Capturing:
        _say(
            case.label, f"{case.label}: not proven before this graph was captured, plain torch computes it there", True
        )
        return len(case.listed), None
    found = chosen, case.listed[chosen] if chosen < len(case.listed) else None
    _settled[own, launch] = found
    _say(case.label, case.line(at, chosen), chosen > 0)
    return found


def _parse(entry: dict | None) -> Verdict | None:
    try:
        return None if entry is None else Verdict(**entry)
    except TypeError:  # not one of ours
        return None


def _say(label: str, line: str, loud: bool) -> None:
    """Kept for `table`; a warning too, once, where not the first tiles run."""
    if _lines.get(label) != line:
        _lines[label] = line
        if loud:
            warnings.warn(line, stacklevel=2)
