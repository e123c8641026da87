"""The build of the images as far as a machine without a Docker engine can go: `python docker/rehearse.py [cpu build gpu]`.
`python docker/rehearse.py run` follows the page's own commands at 1/1000 instead (rehearse_path.py).

Each stage of the Dockerfile is followed instruction by instruction in a folder that stands for the image's root. COPY copies
what .dockerignore lets through. RUN runs, command by command, in an environment of its own over this Python's packages, with the
image's paths put below the folder. ENV, ARG and WORKDIR hold as they do there. What needs a network, root or the base image is
named with its reason and not run; with `--network` pip resolves the pinned set in a dry run, by hash, without installing it.
Last come the commands that the image starts with, `cmt train` as a dry run.

A stage without a compiler (python:slim has none) is rehearsed without one. The build of the CUDA library takes minutes;
`--arg CMT_CUDA_ARCHS=80` shortens it. The exit code is 1 where a command failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("/opt/cmt-fast", "/src", "/wheels", "/runs", "/home/cmt", "/tmp")  # of the image, that its commands write to
# of a command, why it is not run here; the first that fits
LEFT_OUT = {
    r"^(apt-get|rm -rf /var/lib/apt)": "needs a network and root",
    r"^useradd ": "needs root",
    r"--require-hashes": "needs a network; --network resolves it",
    r"--index-url": "needs a network, and torch is this Python's",
    r"/etc/pip/constraint\.txt|check_gpu\.py after": "needs the base image",
    r"^rm /tmp/torch-before": "the check before it was not run",
}


class Stage(NamedTuple):
    """A FROM and what follows: body is (word, the rest of the line, continued lines joined)."""

    base: str
    name: str
    body: list[tuple[str, str]]


class Step(NamedTuple):
    """A command of a stage; why: why it is not run here, "" for one that is."""

    command: str
    why: str


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile, comments aside."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    found: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name, []))
        elif found:
            found[-1].body.append((word, rest))
    return found


def steps(run: str) -> list[Step]:
    """The commands of a RUN, joined there by &&, in order."""
    commands = [part.strip() for part in run.split(" && ")]
    return [Step(c, next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, c)), "")) for c in commands]


class Rehearsal:
    """One stage after another in a folder; `failed` counts the commands that did."""

    def __init__(self, folder: Path, given: dict[str, str], network: bool) -> None:
        self.folder, self.given, self.network, self.failed = folder, given, network, 0
        venv.create(folder / "python", system_site_packages=True, symlinks=True)
        (own,) = (folder / "python" / "lib").glob("python3*/site-packages")
        outer = [
            p for p in sys.path if p.endswith("site-packages")
        ]  # of a virtual environment, which it would pass over
        (own / "outer.pth").write_text("\n".join(outer) + "\n")
        self.bin = folder / "python" / "bin"
        (self.bin / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(str(self.bin / "python"))} -m pip "$@"\n')
        (self.bin / "pip").chmod(0o755)

    def there(self, text: str) -> str:
        """A text with the image's paths below the folder."""
        at = "|".join(map(re.escape, PLACES))
        return re.sub(rf"(?<![\w./])({at})(?=[/\s\"';]|$)", lambda m: f"{self.folder}{m[1]}", text)

    def stage(self, stage: Stage) -> None:
        """Follow a stage. Prints each command and what became of it."""
        print(f"{stage.name}: FROM {stage.base}", flush=True)
        folder, environment = self.folder, dict(os.environ)
        environment["PATH"] = f"{self.bin}{os.pathsep}{environment.get('PATH', '')}"
        environment.pop("PYTHONPATH", None)
        if "slim" in _bases().get(stage.base.strip("${}"), ""):
            environment["CXX"] = "no-compiler-in-this-image"
        for place in ("/tmp", "/runs"):
            Path(self.there(place)).mkdir(parents=True, exist_ok=True)
        for word, rest in stage.body:
            if word == "WORKDIR" and rest != "/":
                folder = Path(self.there(rest))
                folder.mkdir(parents=True, exist_ok=True)
            elif word == "ARG":
                key, _, value = rest.partition("=")
                environment[key] = self.given.get(key, value)
            elif word == "ENV":
                environment |= {k: self.there(v) for k, v in (pair.split("=", 1) for pair in shlex.split(rest))}
            elif word == "COPY" and "--from=" not in rest:  # from a stage: it lies in the same folder already
                self.copy(rest, folder)
            elif word == "RUN":
                for step in steps(rest):
                    self.step(step, folder, environment)
        for word, command in starts(stage):
            self.step(Step(command, ""), self.folder, environment, word)

    def copy(self, rest: str, folder: Path) -> None:
        """COPY what the context has: all but what .dockerignore names."""
        *sources, target = rest.split()
        into = Path(self.there(target)) if target.startswith("/") else folder / target
        for source in sources:
            at = into / Path(source).name if target.endswith("/") else into
            at.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "build.json")
                shutil.copytree(ROOT / source, at, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(ROOT / source, at)
        print(f"  done      COPY {rest}", flush=True)

    def step(self, step: Step, folder: Path, environment: dict[str, str], word: str = "RUN") -> None:
        """Run a command, or say why not."""
        command, why = step
        if self.network and "--require-hashes" in command:
            command, why = command.replace("pip install", "pip install --dry-run --ignore-installed"), ""
        if not why and environment.get("CMT_CUDA", "") != "0" and "CMT_CUDA=1" in command and not shutil.which("nvcc"):
            why = "needs nvcc"
        if not why and command.startswith("install -d -o") and os.geteuid():
            why = "needs root"
        if why:
            print(f"  left out  {word} {command}  ({why})", flush=True)
            return
        done = subprocess.run(
            ["bash", "-c", self.there(command)], cwd=folder, env=environment, capture_output=True, text=True
        )
        print(f"  {'FAILED' if done.returncode else 'done  '}    {word} {command}", flush=True)
        if done.returncode:
            self.failed += 1
            print("\n".join((done.stdout + done.stderr).splitlines()[-20:]), flush=True)


def starts(stage: Stage) -> Iterator[tuple[str, str]]:
    """(CMD, command) that an image of the stage begins with, made short."""
    for word, rest in stage.body:
        if word == "CMD":
            command = shlex.join(json.loads(rest))
            yield word, f"{command} --dry-run" if " train " in command else command


def path_module() -> types.ModuleType:
    """rehearse_path.py, which lies beside this file and in no package."""
    found = importlib.util.spec_from_file_location("rehearse_path", Path(__file__).with_name("rehearse_path.py"))
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["rehearse_path"] = module
    found.loader.exec_module(module)
    return module


def _path(folder: Path | None) -> int:
    """Follow the page. 1 where a command failed or a promise was not kept."""
    with tempfile.TemporaryDirectory() as temporary:
        place = (folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        rehearsal = path_module().Rehearsal(place)
        rehearsal.run()
    return int(rehearsal.failed > 0)


def _bases() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", (ROOT / "docker/Dockerfile").read_text("utf-8"), flags=re.M))


def main(arguments: list[str] | None = None) -> int:
    """Rehearse the stages that are named. 1 where a command failed."""
    p = argparse.ArgumentParser(description="Follow the Dockerfile without an engine, or by `run` the page at 1/1000.")
    known = stages((ROOT / "docker/Dockerfile").read_text("utf-8"))
    names = [stage.name for stage in known]
    p.add_argument("stages", nargs="*", default=names, metavar="STAGE", help=f"of {', '.join(names)} (default: all)")
    p.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="as docker's --build-arg")
    p.add_argument("--network", action="store_true", help="let pip resolve the pinned set, in a dry run")
    p.add_argument("--folder", type=Path, help="the root; it is kept (default: a temporary one, which is not)")
    args = p.parse_args(arguments)
    if args.stages == ["run"]:
        return _path(args.folder)
    if unknown := [name for name in args.stages if name not in names]:
        p.error(f"{unknown[0]!r} is no stage; the stages are {', '.join(names)}")
    given = dict(pair.split("=", 1) for pair in args.arg)
    with tempfile.TemporaryDirectory() as temporary:
        rehearsal = Rehearsal((args.folder or Path(temporary)).resolve(), given, args.network)
        for stage in known:
            if stage.name in args.stages:
                rehearsal.stage(stage)
    return int(rehearsal.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
