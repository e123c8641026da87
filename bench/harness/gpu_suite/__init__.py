"""Everything a machine with a GPU is for, in one sitting: `python -m bench gpu --minutes 14`, by what it teaches first.

GPU-marked tests, attention over its shapes and both digits recipes run beside each other, since none of them times anything; then
calibration, the step table, ops, rollouts, the loop's losses, and a larger network, each alone. Every part has its share of the
minutes, what one leaves over goes to those after it, and each is a process group of its own that is stopped at its limit
(runner.py). Rows are on disk as they come, and the summary names the parts and rows that were not measured.

It runs from the repository root with nothing installed from it. A part whose packages are missing says which; the others run all
the same. Results go to bench/results/<device>/; where OUT is set, to $OUT/gpu.json in one piece with $OUT/gpu.log and the pages
of the trainings, and `python -m bench gpu --unpack gpu.json` puts them into their folder elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from bench.harness.gpu_suite import runner
from bench.harness.gpu_suite.parts import PARTS, Sitting, missing
from bench.harness.results_file import ROOT, about, slug, write_json

MINUTES = 14.0
RESULTS = ROOT / "bench" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; those of a sitting if absent")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of all parts together; default {MINUTES:.0f}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small shapes, all code paths")
    parser.add_argument("--unpack", type=Path, metavar="GPU.JSON", help="write a sitting's results into bench/results")


def unpack(file: Path, results: Path = RESULTS) -> list[Path]:
    """The results of a sitting, each in a file of its own below the device's folder; those of other parts stay."""
    bundle = json.loads(file.read_text("utf-8"))
    if bundle["summary"]["tiny"]:
        raise SystemExit(f"gpu: {file} is of a dry run")
    folder, out = results / bundle["summary"]["slug"], []
    for name, content in bundle["results"].items():
        out.append(folder / f"{name}.json")
        write_json(out[-1], content)
    before = folder / "summary.json"
    summary = bundle["summary"]
    if before.is_file():
        summary = summary | {"parts": json.loads(before.read_text("utf-8"))["parts"] | summary["parts"]}
    write_json(before, summary)
    return [*out, before]


def run(arguments: argparse.Namespace) -> int:
    """Run the parts, all of them whatever one of them did; 1 if one failed, could not run or left rows unmeasured."""
    if arguments.unpack:
        print("\n".join(map(str, unpack(arguments.unpack))))
        return 0
    for part in arguments.part:
        if part not in PARTS:
            raise SystemExit(f"gpu: {part!r} is not valid; valid are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: this machine has no CUDA device; `make gpu-dry` runs the same parts on a CPU")
    chosen = [p for p in PARTS.values() if p.name in arguments.part or (not arguments.part and p.sitting)]
    facts = about(arguments.device)
    facts |= {"tiny": arguments.tiny, "minutes": arguments.minutes, "slug": slug(arguments.device, facts["device"])}
    out, scratch = os.environ.get("OUT"), tempfile.mkdtemp(prefix="bench-gpu-")
    apart = bool(out) or arguments.tiny  # a dry run's rows are nobody's results
    work = Path(scratch) if apart else RESULTS / facts["slug"]
    sitting = Sitting(arguments.device, arguments.tiny, work, Path(scratch))
    lacks = {part.name: missing(part) for part in chosen}
    files = runner.Files(facts, work, Path(scratch) / "gpu.log", Path(out) if out else None)
    summary = runner.run([p for p in chosen if not lacks[p.name]], sitting, arguments.minutes, files, lacks)
    print(runner.text(summary))
    print(f"written to {out or work}; what the parts printed: {out or scratch}/gpu.log")
    return int(any(part["status"] != "ok" for part in summary["parts"].values()))
