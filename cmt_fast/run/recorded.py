"""What run.json says of the settings that its stages had, and whether it can be written anew where it is damaged.

A checkpoint's manifest carries a digest of the settings that its weights depend on, and run.json the digests that the run has
had for each stage. So a checkpoint that was copied in from another run is not trained on, and a run.json that was damaged can be
written again from the same recipe: what the manifests say proves that it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES, Run
from cmt_fast.run import changes
from cmt_fast.run.folder import RUN_FILE, about_run
from cmt_fast.storage import checkpoint, sound


def lost(run: Run, folder: Path) -> str:
    """What is wrong with run.json, where it can be written anew: all stages that have begun were trained with these settings.
    Empty where nothing is. Raises ConfigError where other settings were theirs, or nobody knows.
    """
    try:
        loading.build(about_run(folder)["run"])
        return ""
    except (FileNotFoundError, ConfigError):  # whole, and of another version: it says what is not valid
        return ""
    except sound.Unsound as error:
        why = error.why
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = f"cannot be read ({' '.join(str(error).split())[:200]})"
    for name in STAGES:
        found = checkpoint.newest(folder / name)
        mine = fingerprint.content_digest(run, name) if name in run.stages else None
        if found and found.manifest.get("content") is None:
            raise ConfigError(
                f"--out: {folder / RUN_FILE} {why}, and the checkpoints of {name} are of a version that did not say by which "
                "settings they were trained; restore that file, or choose another folder"
            )
        if found and found.manifest["content"] != mine:
            raise ConfigError(
                f"--out: {folder / RUN_FILE} {why}, and {name} was not trained with these settings; "
                "with those that it was trained with last it is written anew"
            )
    return why


def put_aside(run: Run, folder: Path) -> None:
    """Give a damaged run.json another name, and say so. Raises ConfigError as `lost`."""
    if why := lost(run, folder):
        sound.aside(folder / RUN_FILE, f"{why}, it is written anew")


def contents(run: Run, before: dict[str, Any], had: Mapping[str, Sequence[changes.Change]]) -> dict[str, list[str]]:
    """Digests of the settings that a run has had for each stage, those of now the last. before: run.json as it is; had: what was
    changed while stages were under way, which says of a run.json that is written anew what was before."""
    was = before.get("contents") or {}
    out = {name: [*(was.get(name) or ())] for name in run.stages}
    for name, entries in had.items():
        for earlier in changes.before(run, name, entries):
            for member in run.stages:
                out[member].append(fingerprint.content_digest(earlier, member))
    return {name: list(dict.fromkeys([*known, fingerprint.content_digest(run, name)])) for name, known in out.items()}


def roots(before: dict[str, Any]) -> list[str]:
    """Where a run was trained from before it goes on from here: names of other runs start there too."""
    earlier = dict.fromkeys(root for root in (before.get("root"), *before.get("roots", ())) if root)
    return [root for root in earlier if root != str(Path.cwd())]
