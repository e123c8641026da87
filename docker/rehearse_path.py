"""The path of docker/README.md at 1/1000 of its size, command by command: `python docker/rehearse.py run`.

The commands are the page's own, taken out of it each time. Those of the sections Data, Train, Evaluate and Use are the full ones,
made small by the table of the section "At 1/1000" and by nothing else; what stands in for a download comes from the block of the
section "The same on a CPU". Each runs in a process of its own, as a reader would type it, and is printed with its seconds. At the
end what was promised is looked for: finished stages, a two-step figure better than that of the network before mid-training, the
model card, and a pipeline that draws in a process in which nothing of ours can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("diffusers",)  # of the extra `latents`: the made-up autoencoder, and the pipeline
PAGE = ROOT / "docker" / "README.md"
SMALL = "The same on a CPU"  # its block has what stands in for what is downloaded
SCALE = "At 1/1000"
# before which section which lines of that block come, by what is in them
BEFORE = {
    "Data": r"synthetic",
    "Train": r"runs/public|teacher\.safetensors",
    "Evaluate": r"--make-reference",
    "Use": r"^$",
    "": r"--heartbeat",
}
DRAWS = """
import sys, torch
from diffusers import DiffusionPipeline
assert not any(name.startswith("cmt") for name in sys.modules)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = pipe(num_inference_steps=2, batch_size=2, seed=0, output_type="pt").images
assert torch.isfinite(image).all() and image.std() > 0, image
print("draws", tuple(image.shape))
"""


class Command(NamedTuple):
    """A line of the page made small; why: why it is not run here, "" for one that is."""

    section: str
    text: str
    why: str = ""


def commands(page: str) -> list[Command]:
    """What is run, in order. Raises KeyError for a section that the page has no longer."""
    small, table = _lines(page, SMALL), scaled(page)
    found: list[Command] = []
    for section, pattern in BEFORE.items():
        found += [_made(section, line, table) for line in small if re.search(pattern, line)]
        found += [_made(section, line, table) for line in (_lines(page, section) if section else [])]
    return found


def scaled(page: str) -> list[tuple[str, str, str]]:
    """The table of the page: what stands in a full command, and what stands for it at 1/1000 or why it is left out."""
    rows = r"^\| `([^`]+)` \| (?:`([^`]*)`|left out: (.*)) \|$"
    return re.findall(rows, _section(page, SCALE), flags=re.M)


def _made(section: str, line: str, table: list[tuple[str, str, str]]) -> Command:
    for full, small, why in table:
        if full in line and why:
            return Command(section, line, why)
        line = line.replace(full, small) if not why else line
    return Command(section, line)


def _section(page: str, title: str) -> str:
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", page, flags=re.M)}[title]


def _lines(page: str, title: str) -> list[str]:
    body = "".join(re.findall(r"```bash\n(.*?)```", _section(page, title), flags=re.S))
    lines = re.sub(r"\\\n\s*", "", body).splitlines()
    return [line for raw in lines if (line := re.sub(r"(^|\s+)#.*", "", raw).strip())]


class Rehearsal:
    """The commands one after another in a folder; `failed` counts those that did, and promises that were not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failed = folder, 0
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        here = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        # a thread each, as torchrun gives its ranks: more of them wait for one another where the cores are shared
        self.environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PATH": path, "PYTHONPATH": here}
        (folder / "docker").symlink_to(ROOT / "docker")

    def run(self) -> None:
        """All of the page, then what it promised."""
        lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if lacking:
            sys.exit(
                f"{', '.join(lacking)}: not installed; pip install -e '.[demo,latents]' brings what the page needs"
            )
        began, section = time.monotonic(), None
        for command in commands(PAGE.read_text("utf-8")):
            if command.section != section:
                section = command.section
                print(f"{section or 'After it'}:", flush=True)
            if command.why:
                print(f"  left out  {command.text}  ({command.why})", flush=True)
                continue
            words = shlex.split(command.text)
            self.step(command.text, [sys.executable, "-m", "cmt_fast", *words[1:]] if words[0] == "cmt" else words)
        print("What was promised:", flush=True)
        for name, call in (("stages", self.stages), ("figures", self.figures), ("card", self.card)):
            self.promise(name, call)
        self.step("the pipeline draws without cmt_fast", [sys.executable, "-c", DRAWS, "img512-two-step"], bare=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        core = (spent.ru_utime + spent.ru_stime) / 60
        print(f"{(time.monotonic() - began) / 60:.1f} minutes, {core:.1f} of a core; {self.failed} failed", flush=True)

    def step(self, text: str, words: list[str], bare: bool = False) -> None:
        """Run a command; bare: with nothing of ours to import."""
        environment = {k: v for k, v in self.environment.items() if not (bare and k == "PYTHONPATH")}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        self.say(text, done.returncode == 0, f"({time.monotonic() - began:.0f} s, {spent:.0f} of a core)")
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-20:]), flush=True)
        if " eval " in text and "--json" in text and not done.returncode:
            (self.folder / "figures.json").write_text(done.stdout[done.stdout.index("{") :])

    def say(self, text: str, good: bool, more: str = "") -> None:
        self.failed += not good
        print(f"  {'done  ' if good else 'FAILED'}    {text}  {more}".rstrip(), flush=True)

    def promise(self, name: str, call) -> None:
        """One of those below: what it found, good or not."""
        try:
            good, text = call()
        except (OSError, ValueError, KeyError, IndexError) as error:
            good, text = False, f"{type(error).__name__}: {error}"
        self.say(f"{name}: {text}", good)

    def stages(self) -> tuple[bool, str]:
        """mid and post are finished, by the manifests of their last checkpoints."""
        found = {}
        for stage in ("mid", "post"):
            newest = sorted((self.folder / "runs" / "img512" / stage / "checkpoints").glob("step-*"))[-1]
            about = json.loads((newest / "manifest.json").read_text("utf-8"))
            found[stage] = about["nimg"] if about["done"] else 0
        return all(found.values()), ", ".join(f"{k} {n:,} images" for k, n in found.items())

    def figures(self) -> tuple[bool, str]:
        """The two-step figure is finite and better than that of the network before mid-training."""
        command = "eval runs/teacher/pre --steps 2 -n 64 --reference reference.npz --json"
        words = [sys.executable, "-m", "cmt_fast", *command.split()]
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return False, done.stderr.strip()[-200:]
        ours = dict(_values(json.loads((self.folder / "figures.json").read_text("utf-8"))))
        before = dict(_values(json.loads(done.stdout[done.stdout.index("{") :])))
        return ours[2] < before[
            2
        ], f"two steps {ours[2]:.4g}, one {ours[1]:.4g}; before mid-training {before[2]:.4g} in two"

    def card(self) -> tuple[bool, str]:
        """The exported folder has a model card that names what a reader needs."""
        text = (self.folder / "img512-two-step" / "README.md").read_text("utf-8")
        lacking = [
            word for word in ("license", "from_pretrained", "## Figures", "num_inference_steps") if word not in text
        ]
        return not lacking, f"has no {lacking}" if lacking else f"{len(text.splitlines())} lines"


def _values(found: dict) -> Iterator[tuple[int, float]]:
    """(steps, figure) of what `cmt eval --json` prints."""
    for steps, row in found["steps"].items():
        yield int(steps), float(row["frechet"])
