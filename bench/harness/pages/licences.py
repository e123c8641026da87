"""Under which licence everything comes that is installed: docs/licences.md from docs/licences.json, and that from metadata.

`python -m bench licences` reads what the packages of this environment say of themselves, and writes the file; --also reads
another folder of packages beside it, for what only another Python or an extra needs. The page is made of the file, so that it
does not change with the environment that makes it. A package of a lock or of pyproject.toml that is not in it is an error.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.harness import results_file

FILE, LOCKS = Path("docs/licences.json"), Path("locks")
OURS = {"cmt-fast", "cmt-kernels", "pip"}
CLOSED = ("Proprietary", "NVIDIA")  # no open source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where else packages lie."""
    parser.add_argument("--also", type=Path, nargs="*", default=[], metavar="FOLDER", help="more folders of packages")


def run(args: argparse.Namespace) -> int:
    """Write docs/licences.json."""
    found: dict[str, metadata.Distribution] = {}
    for d in [*metadata.distributions(), *metadata.distributions(path=[str(f) for f in args.also])]:
        found.setdefault(plain(d.metadata["Name"]), d)
    rows = {name: _row(found[name], found) for name in sorted(_needed(found))}
    results_file.write_json(FILE, rows)
    missing = lacking()
    print(f"{FILE}: {len(rows)} packages" + (f"; not installed here: {', '.join(missing)}" if missing else ""))
    return 1 if missing else 0


def table(_: str = "") -> str:
    """A row a package. Raises ValueError for one that is needed and not known, and for one without a licence."""
    rows = json.loads(FILE.read_text("utf-8"))
    missing = lacking()
    if missing:
        raise ValueError(f"{FILE}: {', '.join(missing)} is needed and not there; run `python -m bench licences`")
    out = ["| package | version read | licence | needed by |", "|---|---|---|---|"]
    for name, row in rows.items():
        if not row["licence"]:
            raise ValueError(f"{FILE}: {name} has no licence")
        out.append(
            f"| {name} | {row['version']} | {row['licence']} | {', '.join(row['needed_by']) or 'an option of another'} |"
        )
    closed = [name for name, row in rows.items() if any(word in row["licence"] for word in CLOSED)]
    copyleft = [name for name, row in rows.items() if re.search(r"GPL", row["licence"])]
    out.append(
        f"\n{len(rows)} packages. Not open source: {', '.join(closed)}. Under a GPL: {', '.join(copyleft) or 'none'}.\n"
    )
    return "\n".join(out) + "\n"


def lacking() -> list[str]:
    """What a lock or a pyproject.toml names and docs/licences.json does not."""
    known = set(json.loads(FILE.read_text("utf-8"))) if FILE.is_file() else set()
    needed = {plain(r) for r in (*direct(), *locked())}
    return sorted(needed - known - OURS)


def locked() -> dict[str, set[str]]:
    """Package -> versions, of every lock of what the trainer needs; not of the programs of `make audit`."""
    found: dict[str, set[str]] = {}
    for file in (LOCKS / "demo.txt", LOCKS / "dev.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text("utf-8"), flags=re.M):
            found.setdefault(plain(name), set()).add(version)
    return found


def direct() -> dict[str, list[str]]:
    """Requirement -> where pyproject.toml names it: `core` or extras."""
    text = Path("pyproject.toml").read_text("utf-8")
    found: dict[str, list[str]] = {}
    core = text.split("\ndependencies = [")[1].split("\n]")[0]
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    parts = [("core", core)] + re.findall(r"^([a-z]+) = \[(.*?)\](?:\s|$)", extras, flags=re.M | re.S)
    for extra, body in parts:
        for requirement in re.findall(r'"([^"]+)"', body):
            if not requirement.startswith("cmt-fast["):
                found.setdefault(requirement, []).append(extra)
    return found


def plain(requirement: str) -> str:
    """The name in a requirement, as an index spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def licence(about: Any) -> str:
    """What metadata says: an SPDX expression, else its licence where that is a name and no text, else its classifiers."""
    said = about.get("License-Expression") or ""
    text = (about.get("License") or "").strip()
    if not said and text and "\n" not in text and len(text) < 60 and text.upper() != "UNKNOWN":
        said = text
    if not said:
        kinds = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
        said = " and ".join(dict.fromkeys(re.sub(r"^License :: (OSI Approved :: )?", "", c) for c in kinds))
    return said.replace("|", "/")


def _row(d: metadata.Distribution, found: dict[str, metadata.Distribution]) -> dict[str, Any]:
    name = plain(d.metadata["Name"])
    ours = [extra for r, extras in direct().items() if plain(r) == name for extra in extras]
    parents = [n for n, p in found.items() if n not in OURS and name in _requires(p)]
    return {
        "version": d.version,
        "licence": licence(d.metadata),
        "needed_by": sorted(dict.fromkeys(ours)) or sorted(parents),
    }


def _needed(found: dict[str, metadata.Distribution]) -> set[str]:
    """What pyproject.toml and the locks name, and all that these need in turn, so far as it is installed."""
    reached, more = set(), {plain(r) for r in (*direct(), *locked())} & set(found)
    while more:
        reached |= more
        more = {n for name in more for n in _requires(found[name])} & set(found) - reached
    return reached - OURS


def _requires(d: metadata.Distribution) -> set[str]:
    return {plain(r) for r in d.requires or [] if "extra ==" not in r}
