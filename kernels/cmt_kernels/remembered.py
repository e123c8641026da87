"""What was found out about a machine, kept for the next process: one JSON file a question.

`~/.cache/cmt_fast/<name>` holds machine -> label -> entry. A machine is the card or processor and every version that
could change the answer, so an entry is never stale, only unused. A file that cannot be read is as good as none, and a home that
cannot be written means that the next process finds out again.
"""

import json
import os
from pathlib import Path


def path(name: str) -> Path:
    """The file of this name, in XDG_CACHE_HOME where that is set."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without HOME whom the system does not know, as in a container
        cache = Path(os.devnull)  # which holds no file and takes none
    return cache / "cmt_fast" / name


def read(file: Path, machine: str) -> dict[str, dict]:
    """label -> entry of one machine; empty if there is no file or it is not one of ours."""
    return {label: entry for label, entry in _everything(file).get(machine, {}).items() if isinstance(entry, dict)}


def keep(file: Path, machine: str, label: str, entry: dict) -> None:
    """Add one entry. The file is replaced in one step; of two processes that add at once one may be forgotten."""
    everything = _everything(file)
    everything.setdefault(machine, {})[label] = entry
    scratch = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(everything, indent=1))
        scratch.replace(file)
    except OSError:
        pass  # a home that cannot be written: remembered in this process alone


def _everything(file: Path) -> dict[str, dict]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}
