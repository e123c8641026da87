"""`cmt eval` and `cmt sample` killed by SIGKILL over and over, until they end: what they end with, and what was done twice.

A tiny network on digits, whose weights no training made. The commands run in forked children of one process; how many rows
each drew is told through a file, of kills too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cmt_fast import api
from cmt_fast.cli import main
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.storage import checkpoint

SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "eval.batch=50"]
BETWEEN_S = (0.3, 1.2)  # kills


def measured(n: int, seed: int = 0) -> dict[str, Any]:
    """Of each command: kills, samples drawn in all processes together over those of one, whether what it ends with is equal."""
    torch.set_num_threads(1)
    out, rng = {}, random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        run = _run(Path(place) / "run")
        commands: dict[str, tuple[Callable[[Path], list[str]], Callable[[Path], str]]] = {
            "eval": (lambda f: ["eval", f"{run}/pre", "--n", str(n), "--json"], lambda f: (f / "said").read_text()),
            "sample, .npz": (lambda f: _sample(run, n, f / "x.npz"), lambda f: _sum([f / "x.npz"])),
            "sample, PNGs": (lambda f: _sample(run, n, f / "x"), lambda f: _sum(sorted((f / "x").iterdir()))),
        }
        for name, (command, result) in commands.items():
            found = []
            for kills in (False, True):
                folder = Path(place) / f"{name}-{kills}"
                folder.mkdir()
                killed = _until_done(command(folder), folder, rng if kills else None)
                found.append((killed, sum(map(int, (folder / "drawn").read_text().split())), result(folder)))
            (_, once, want), (killed, drawn, got) = found
            left = [p.name for p in (*run.glob("judging"), *folder.glob("*.part"))]
            out[name] = {"kills": killed, "drawn": drawn, "drawn_alone": once, "equal": got == want, "left": left}
    return out


def _run(folder: Path) -> Path:
    """A run of digits with the stage pre, and all that judging it needs of the data."""
    work = api.open_recipe("digits", *SMALL, out=folder)
    work.claim()
    net = work.build()
    tensors = {k: p.detach() + 0.05 * torch.randn(p.shape) for k, p in net.named_parameters()}
    about = {"stage": "pre", "nimg": 0, "done": True, "parent": None, "config": ""}
    checkpoint.save(folder / "pre", 1, {"model": tensors, "ema-0": tensors}, about)
    work.judging.keep()
    return folder


def _sample(run: Path, n: int, out: Path) -> list[str]:
    return ["sample", f"{run}/pre", "--n", str(n), "--out", str(out)]


def _sum(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def _until_done(command: list[str], folder: Path, rng: random.Random | None) -> int:
    """Run it until it ends well; how often it was killed."""
    for kills in range(1000):
        pid = os.fork()
        if not pid:
            _child(command, folder)
        end = time.monotonic() + (rng.uniform(*BETWEEN_S) if rng else 600)
        ended, status = os.waitpid(pid, os.WNOHANG)
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return kills
        if rng is None or code != -signal.SIGKILL:
            raise RuntimeError(f"{' '.join(command)}: ended with {code}")
    raise RuntimeError("killed a thousand times")


def _child(command: list[str], folder: Path) -> None:
    """Never returns: the command, with a number for each network call's rows in FOLDER/drawn, and its words in FOLDER/said."""
    handle = os.open(folder / "drawn", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    draw, draw_each = Sampler.draw, Sampler.draw_each

    def told(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Sampler, net: Any, steps: Any, seed: int, index: torch.Tensor, solver: bool = False) -> Any:
            os.write(handle, f"{len(index)}\n".encode())
            return real(self, net, steps, seed, index, solver)

        return call

    Sampler.draw, Sampler.draw_each = told(draw), told(draw_each)  # type: ignore[method-assign]
    said = io.StringIO()
    code = 1
    try:
        with contextlib.redirect_stdout(said), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            code = main(command)
        if not code and "--json" in command:
            figures = json.loads(said.getvalue())
            (folder / "said").write_text(json.dumps(figures))
    finally:
        os._exit(code)
