"""`make audit`: known faults of every package in this environment, by pip-audit, and whether they were looked up at all.

pip-audit says "No known vulnerabilities found" and ends with 0 where it found no package at all in the list that it asks: so
behind a mirror of PyPI that has files alone. What was asked and what was answered are counted here. A build of torch is
asked for by its release: 2.13.0+cpu has no entry, 2.13.0 has.

Exit status: 0 all were looked up and no fault is known; 1 a fault is known; 2 not all were looked up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

OURS = {"cmt-fast", "cmt-kernels"}
PROGRAM = Path(".venv/tools/bin/pip-audit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pip-audit, and what to hand on to it."""
    parser.add_argument(
        "--program", type=Path, default=PROGRAM, help="pip-audit in an environment of its own (%(default)s)"
    )
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whose list of faults (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Ask for every installed package; print what is known."""
    if not args.program.is_file():
        print(f"audit: {args.program} is not there; `make audit` installs it")
        return 2
    wanted = installed()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "installed.txt"
        file.write_text("".join(f"{name}=={version}\n" for name, version in sorted(wanted.items())), "utf-8")
        words = ["-r", str(file), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(
            [str(args.program), *words, "--vulnerability-service", args.service], capture_output=True, text=True
        )
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        print(
            f"audit: nothing was looked up. {args.service} gave no answer; this needs a network. pip-audit says: {last[:200]}"
        )
        return 2
    return told(answers, wanted, args.service)


def installed() -> dict[str, str]:
    """Every package of this environment but ours: its release, without what a build adds to it."""
    found = {_name(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()}
    return {name: version for name, version in found.items() if name not in OURS}


def told(answers: list[dict], wanted: dict[str, str], service: str) -> int:
    """Print a line for each fault, and one for all; the exit status."""
    asked = {_name(row["name"]) for row in answers if "skip_reason" not in row} & set(wanted)
    faults = [(row, fault) for row in answers for fault in row.get("vulns", [])]
    for row, fault in faults:
        fixed = ", ".join(fault.get("fix_versions") or []) or "no release yet"
        print(f"{row['name']} {row['version']}: {fault['id']}; fixed in {fixed}")
    missing = sorted(set(wanted) - asked)
    print(f"audit: {len(asked)} of {len(wanted)} packages looked up at {service}, {len(faults)} known faults")
    if missing:
        names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        print(f"audit: not looked up: {names}. Is {service} reached itself, or a mirror that has files alone?")
    return 1 if faults else 2 if missing else 0


def _name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
