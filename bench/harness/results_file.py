"""Results as JSON with device, versions, commit and date."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import assembler

ROOT = Path(__file__).parents[2]
CARDS = ("h100", "h200", "a100")


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this tree: what a copy says of itself (CMT_COMMIT; COMMIT, by harness/kit.py), else what git says."""
    carried = ROOT / "COMMIT"
    said = os.environ.get("CMT_COMMIT") or (carried.read_text() if carried.exists() else "")
    if not said and shutil.which("git"):
        described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        said = subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout
    return said.strip() or None


def about(device: str) -> dict[str, Any]:
    """What a number is worthless without."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "assembler": str(assembler.choose(assembler.card())) if device == "cuda" else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device: str, name: str) -> str:
    """The folder of a device's results: "cpu", "h100" for every H100, another card by its whole name."""
    if device == "cpu":
        return "cpu"
    return next((c for c in CARDS if c in name.lower()), re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))


def write_json(path: Path, content: Any) -> None:
    """Replace a file as a whole: who is killed meanwhile leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    scratch.replace(path)


def save(kind: str, device: str, results: dict[str, Any], path: Path | None = None) -> Path:
    """Write results as JSON: to the path given, else $OUT/<kind>.json where OUT is set, else
    bench/results/<device>/<date>-<kind>.json."""
    if path is None and os.environ.get("OUT"):
        path = Path(os.environ["OUT"]) / f"{kind}.json"
    elif path is None:
        folder = ROOT / "bench" / "results" / slug(device, results["device"])
        path = folder / f"{results['date'][:16].replace(':', '')}-{kind}.json"
    write_json(path, results)
    return path


class Results:
    """A result file that is whole on disk after every row, so that a bench that is killed leaves what it measured.

    `not_measured` names what it was asked for and has not come to: all of it at first, so that it holds whenever it ends.
    """

    def __init__(self, kind: str, device: str, path: Path | None = None, **more: Any) -> None:
        self.data: dict[str, Any] = about(device) | more | {"not_measured": [], "rows": []}
        self.path = save(kind, device, self.data, path)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows."""
        self.data["rows"] += rows
        self.write()

    def plan(self, names: Iterable[str]) -> None:
        """What is to be measured."""
        self.data["not_measured"] += names
        self.write()

    def done(self, name: str) -> None:
        """It was measured, or has a row that says why it cannot be."""
        if name in self.data["not_measured"]:
            self.data["not_measured"].remove(name)
            self.write()

    def skip(self, name: str, why: str = "") -> None:
        """Say that something is not measured, here and in the file."""
        text = f"{name}: {why}" if why else name
        print(f"not measured: {text}", flush=True)
        missing = self.data["not_measured"]
        self.data["not_measured"] = [x for x in missing if x != name] + [text]
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)
