"""What a card can do: facts of its datasheet, what was measured on one, and what bench/results say of this very machine.

A card's matmul and copy rates come from a datasheet times the share that a large call reaches, or from a result of
`python -m bench` where one lies in the folder of results. Where a figure is from is kept beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import Stage
from cmt_fast.engine.sharding import memory_bytes


class Step(NamedTuple):
    """A measured training step of a DiT, ours. teacher: its forwards an image; us: microseconds an image; source: file and
    commit; saved: bytes that autograd kept, host: microseconds of a step that its host was busy, None where not measured."""

    objective: str
    precision: str
    teacher: float
    width: int
    depth: int
    tokens: int
    batch: int
    us: float
    source: str
    saved: float | None = None
    host: float | None = None


class Card(NamedTuple):
    """peak, matmul: FLOP/s by precision (datasheet; of a large matmul); copy: bytes/s, read and written; watts: of the
    board; link, network: bytes/s that a card sends inside its machine and that its network card sends outside; flash: its
    attention over an H100's; gemm: (width, share of the large matmul's rate that a DiT's linear layers reach).

    measured: figure -> where it was measured; all others are of `datasheet` or assumed.
    """

    name: str
    peak: dict[str, float]
    matmul: dict[str, float]
    copy: float
    memory: float
    watts: float | None
    link: float
    network: float
    flash: float
    measured: dict[str, str]
    steps: tuple[Step, ...] = ()
    per_machine: int = 8
    gemm: tuple[tuple[int, float], ...] = ((0, 0.0), (768, 0.70), (1024, 0.78), (1152, 0.82))
    datasheet: str = ""


def rate_of(stage: Stage) -> str:
    """The precision at whose rate a stage's products run: fp16's is bf16's on a GPU."""
    return "bf16" if stage.half else stage.products


BEFORE = "on one card of the kind, before this project"
# of the datasheet: what an H100's large bf16 matmul reaches, taken for other precisions and cards too, and what its copy does
REACHED, COPIED = 798 / 989.4, 3.0 / 3.35
# on a processor, read off digits-seeds.json and dual.json of bench/results/cpu: 16 tokens of 128 wide, 256 tokens of 384
GEMM_CPU = ((0, 0.0), (128, 0.15), (384, 0.63))


def _nvidia(name, sheet, rates, bandwidth, memory, watts, links, **more) -> Card:
    """rates: TFLOP/s in bf16, TF32, fp32; TB/s, GB, W; links: GB/s inside and outside the machine.

    sheet: where these are from. more: flash and per_machine as of Card; measured: matmul in bf16 TFLOP/s, copy in TB/s.
    """
    peak = {precision: rate * 1e12 for precision, rate in zip(("bf16", "tf32", "fp32"), rates, strict=True)}
    matmul = {p: REACHED * rate for p, rate in peak.items()}
    if "matmul" in more:
        matmul["bf16"] = more["matmul"] * 1e12
    copy = more.get("copy", COPIED * bandwidth) * 1e12
    link, network = (rate * 1e9 for rate in links)
    known = {text: BEFORE for key, text in (("matmul", "matmul bf16"), ("copy", "copy")) if key in more}
    flash, machine = more.get("flash", 1.0), more.get("per_machine", 8)
    return Card(
        name, peak, matmul, copy, memory * 1e9, watts, link, network, flash, known, (), machine, datasheet=sheet
    )


# datasheets: dense rates, bandwidth, memory, board power; SXM boards: NVLink one way, network of a machine of eight. A card
# for the desk sums bf16 products in fp32, has no NVLink and sends by PCI Express, four in a machine, 10 GbE outside: assumed
ADA, BLACKWELL = "NVIDIA's Ada GPU architecture whitepaper", "NVIDIA's RTX Blackwell GPU architecture whitepaper"
CARDS = {
    card.name: card
    for card in (
        _nvidia(
            "h100", "NVIDIA H100 SXM5 datasheet", (989.4, 494.7, 66.9), 3.35, 80, 700, (450, 50), matmul=798, copy=3.0
        ),
        _nvidia(
            "h200", "NVIDIA H200 SXM5 datasheet", (989.4, 494.7, 66.9), 4.8, 141, 700, (450, 50), matmul=790, copy=4.3
        ),
        _nvidia(
            "a100", "NVIDIA A100 SXM4 80 GB datasheet", (312, 156, 19.5), 2.039, 80, 400, (300, 25), flash=312 / 989.4
        ),
        _nvidia("rtx4090", ADA, (165.2, 82.6, 82.6), 1.008, 24, 450, (31.5, 1.25), flash=165.2 / 989.4, per_machine=4),
        _nvidia(
            "rtx5090", BLACKWELL, (209.5, 104.8, 104.8), 1.792, 32, 575, (63, 1.25), flash=209.5 / 989.4, per_machine=4
        ),
    )
}
PROCESSORS = ("cpu", "laptop")
NAMES = (*CARDS, *PROCESSORS)
LAPTOP = 16e9  # bytes of memory of a notebook: assumed. Its speed is that of the two threads in bench/results/cpu


RESULTS = Path("bench/results")  # of `python -m bench`, in a checkout


def this(device: torch.device) -> Card | None:
    """The card that a run is on, None for one that is not known here."""
    results = RESULTS if RESULTS.is_dir() else None
    name = _named(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    try:
        return card(name, results) if name else None
    except ConfigError:  # a processor without results
        return None


def bare(device: torch.device) -> Card:
    """A device of which nothing is known but its memory and whether it draws a GPU's power."""
    watts = 0.0 if device.type == "cuda" else None
    none = dict.fromkeys(("bf16", "tf32", "fp32"), 0.0)
    return Card(str(device), none, none, 0.0, memory_bytes(device), watts, 0.0, 0.0, 1.0, {})


def _named(device: str) -> str | None:
    """The card that a driver calls `device`, None for one that is not known; a notebook's is another card of the same name."""
    here = device.lower().replace(" ", "").replace("_", "")
    return next((name for name in CARDS if name in here and "laptop" not in here), None)


def card(name: str, results: Path | None) -> Card:
    """The card called `name`, corrected by what was measured on one. Raises ConfigError with the nearest name.

    results: the folder of `python -m bench`'s results, a folder for each device; None where there is none.
    """
    if name not in NAMES:
        raise ConfigError(f"--gpu: {name!r} is not valid; valid are {', '.join(NAMES)}{nearest(name, NAMES)}")
    found = _files(name, results)
    if name in PROCESSORS:
        return _cpu(name, found, results)
    base = CARDS[name]
    matmul, copy, measured = dict(base.matmul), base.copy, dict(base.measured)
    for source, result in found:
        rates = result.get("matmul_flop_s", {})
        for precision, rate in (rates if isinstance(rates, dict) else {"bf16": rates}).items():
            matmul[precision], measured[f"matmul {precision}"] = rate, source
        if "gb_s" in result.get("roof", {}):
            copy, measured["copy"] = result["roof"]["gb_s"] * 1e9, source
    return base._replace(matmul=matmul, copy=copy, measured=measured, steps=_steps(found))


def _cpu(name: str, found: list[tuple[str, dict]], results: Path | None) -> Card:
    """This machine's processor, or a notebook's taken for one like it, by the roof that `python -m bench ops` measured."""
    source, roof = next(((s, r["roof"]) for s, r in reversed(found) if "gflop_s" in r.get("roof", {})), (None, None))
    if source is None:
        raise ConfigError(
            f"--gpu: {name!r} has no measurements in {results or RESULTS}; in a clone of the repository `python -m bench ops` "
            f"makes them, and --results names their folder"
        )
    rate, copy = roof["gflop_s"] * 1e9, roof["gb_s"] * 1e9
    rates = dict.fromkeys(("bf16", "tf32", "fp32"), rate)
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory, sheet = (LAPTOP, "16 GB of memory, assumed") if name == "laptop" else (here, "this machine")
    measured = dict.fromkeys(("matmul fp32", "matmul tf32", "matmul bf16", "copy"), f"{source}, all precisions by fp32")
    flash = rate / CARDS["h100"].matmul["bf16"]
    taken = ", on two threads taken for a notebook's" if name == "laptop" else ""
    steps = tuple(step._replace(source=step.source + taken) for step in _steps(found))
    return Card(name, rates, rates, copy, memory, None, copy, copy, flash, measured, steps, 1, GEMM_CPU, sheet)


def _files(name: str, results: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """(file and commit, result) of every result of this device, oldest first."""
    out, processor = [], name in PROCESSORS
    for file in sorted(results.glob("*/*.json")) if results else []:
        if file.parent.name == "predicted" or processor != (file.parent.name == "cpu"):
            continue
        result = json.loads(file.read_text("utf-8"))
        if not isinstance(result, dict) or result.get("tiny"):
            continue
        if processor or _named(str(result.get("device", ""))) == name:
            out.append((f"{file.parent.name}/{file.name} at {result.get('commit')}", result))
    return sorted(out, key=lambda pair: str(pair[1].get("date", "")))


def _steps(found: list[tuple[str, dict]]) -> tuple[Step, ...]:
    """The rows of whole steps of DiTs in results: ours, the fastest way of each precision."""
    keys = ("objective", "width", "depth", "tokens", "batch", "images_per_s")
    out: dict[tuple, Step] = {}
    for source, result in found:
        rows = result.get("rows", [])
        for row in rows if isinstance(rows, list) else []:
            if str(row.get("how")).removesuffix(", graph") not in ("eager", "compiled") or not all(
                row.get(key) for key in keys
            ):
                continue
            objective, width, depth, tokens, batch, speed = (row[key] for key in keys)
            precision = row.get("precision") or ("fp32" if source.startswith("cpu/") else "bf16")
            teacher = row.get("teacher_forwards")
            teacher = float(objective.startswith("CMT")) if teacher is None else teacher
            which = (objective, precision, teacher, width, depth, tokens)
            saved = 1e6 * row["saved_mb"] if row.get("saved_mb") else None
            host = 1e3 * row["host_ms"] if row.get("host_ms") and row["how"] == "eager" else None
            step = Step(*which, batch, 1e6 / speed, f"{source}, {row['how']}", saved, host)
            if which not in out or step.us < out[which].us:
                out[which] = step
    return tuple(out.values())
