"""The parts of a sitting: what each needs, which command it is, and its share of the time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

TRAINER = ("numpy", "pydantic", "yaml", "safetensors", "xxhash", "rich", "PIL", "jinja2")


class Sitting(NamedTuple):
    """Where and how: device, dry or not, the folder of the results and one for everything else."""

    device: str
    tiny: bool
    results: Path
    scratch: Path

    def file(self, part: str) -> Path:
        """The result of a part."""
        return self.results / f"{part}.json"


class Part(NamedTuple):
    """command(sitting, name, minutes) -> arguments of python. seconds: of a sitting of 14 minutes. beside: it times nothing, so
    it runs beside its neighbours of the kind. sitting: whether it runs where no part was named."""

    name: str
    seconds: float
    needs: tuple[str, ...]
    command: Callable[[Sitting, str, float], list[str]]
    beside: bool = False
    sitting: bool = True


def missing(part: Part) -> list[str]:
    """Packages that a part needs and this Python has not."""
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def tests(s: Sitting, name: str, minutes: float) -> list[str]:
    """The tests marked gpu, in several processes where pytest-xdist is there; in a dry run the dispatch's own."""
    base = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.harness.gpu_suite.pytest_rows",
        "--rows",
        str(s.file(name)),
    ]
    if s.tiny:
        return [*base, "-m", "not gpu", "tests/kernels/test_dispatch.py"]
    have = not [p for p in (*TRAINER, "sklearn") if importlib.util.find_spec(p) is None]
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [*base, "-m", "gpu", *spread, "tests" if have else "tests/kernels"]


def bench(*what: str, tiny: tuple[str, ...] = ("--tiny",), timed: bool = True) -> Callable:
    """`python -m bench WHAT`; tiny: the options of a dry run in place of those after the first of `what`."""

    def command(s: Sitting, name: str, minutes: float) -> list[str]:
        options = (what[0], *tiny) if s.tiny else what
        limit = ["--minutes", f"{minutes:.2f}"] if timed else []
        return ["-m", "bench", *options, "--device", s.device, *limit, "--json", str(s.file(name))]

    return command


def train(s: Sitting, name: str, minutes: float) -> list[str]:
    """Both digits recipes; their pages go beside the log."""
    return [*bench("train")(s, name, minutes), "--reports", str(s.scratch / "reports")]


def calibrate(s: Sitting, name: str, minutes: float) -> list[str]:
    """All of it but the ops, which are a part of their own and would wait for Inductor here."""
    from bench.kernels.calibrate import PARTS as own

    chosen = [part for part in own if part != "ops"]
    return bench("calibrate", *chosen, tiny=("--tiny", "--seconds", "0.01"))(s, name, minutes)


def step(model: str, *objectives: str, more: tuple[str, ...] = ()) -> Callable:
    """Steps of one network; in a dry run a contender a process too, as on a GPU. more: options of a GPU's run alone."""
    options = [text for name in objectives for text in ("--objective", name)]
    dry = ("--tiny", "--apart", "--seconds", "0", "--objective", "FM", "--objective", "MF", "--objective", "CMT-MF")
    return bench(
        "step", "--model", model, *options, *more, tiny=dry if model == "XL256" else (*dry[:6], "--no-compile")
    )


OPS = ("modulated_norm", "gated_residual", "gelu", "qk_norm", "adamw_ema", "attention")
ROLLOUTS = (
    "--model",
    "B256",
    "--model",
    "XL256",
    "--at-once",
    "16",
    "--at-once",
    "64",
    "--seconds",
    "5",
    "--no-compile",
)
TINY_OPS = ("attention", "gelu", "adamw_ema", "--batch", "1", "--seconds", "0.01")
BENCH = partial(Part, needs=TRAINER)
PARTS = {
    part.name: part
    for part in (
        Part("tests", 300, ("pytest",), tests, beside=True),
        Part("sweep", 300, ("numpy",), bench("sweep"), beside=True),
        Part("train", 300, (*TRAINER, "sklearn", "matplotlib"), train, beside=True),
        Part("calibrate", 50, ("numpy",), calibrate),
        Part("proofs", 30, ("numpy",), bench("proofs")),
        BENCH("step", 150, command=step("XL256", "FM", "CMT-MF", "MF")),
        BENCH("step-graph", 90, command=step("XL256", "FM", "CMT-MF", "MF", more=("--graph", "--no-compile"))),
        Part("ops", 80, ("numpy",), bench("ops", *OPS, "--batch", "64", "--seconds", "0.2", tiny=TINY_OPS)),
        BENCH("trajectories", 50, command=bench("trajectories", *ROLLOUTS, tiny=("--tiny", "--seconds", "0.01"))),
        Part("pipeline", 30, (*TRAINER, "sklearn"), bench("pipeline", "--steps", "60")),
        BENCH("step-xl1024", 60, command=step("XL1024", "MF", "FM")),
        # Inductor takes longer than a sitting gives on a slow host: an H100's gave no row in 56 s (2026-11-27)
        Part("ops-compiled", 400, ("numpy",), bench("ops", *OPS, "--batch", "64", "--seconds", "0.2", "--compile",
                                                    tiny=(*TINY_OPS, "--compile")), sitting=False),
        BENCH("step-stream", 90, command=step("XL256", "FM", "MF", more=("--graph", "--stream", "--no-compile")), sitting=False),
        BENCH("step-b256", 230, command=step("B256", "FM", "CMT-MF", "MF"), sitting=False),
        BENCH("step-b1024", 230, command=step("B1024", "FM", "CMT-MF", "MF"), sitting=False),
        BENCH("step-l256", 230, command=step("L256", "FM", "CMT-MF", "MF"), sitting=False),
        BENCH("unet", 120, command=bench("unet", "--turns", "10"), sitting=False),
        BENCH("step-ve", 230, command=step("B256", "CMT-CM", "ECT", "ECD"), sitting=False),
    )
}  # fmt: skip
