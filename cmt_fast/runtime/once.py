"""An error is told once, and not once a rank.

All ranks read the same command, so most errors are everybody's: the first rank of a machine tells them. A rank that is
alone with an error tells it after GRACE_S seconds in which the first one had nothing to say, and names itself. Of those that
come later nobody speaks. torchrun ends its output with a summary of its own; the line is put into that too, by the file in
which torchrun looks for it (TORCHELASTIC_ERROR_FILE).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 3.0
TOLD = "told"  # beside the folders of torchrun's error files, which are of one machine and one attempt
FILE = "TORCHELASTIC_ERROR_FILE"


def rank() -> int:
    """Of this process in all, by what its launcher says; 0 without one."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def voice() -> Iterator[None]:
    """Inside: ranks after the first print nothing but their errors: no lines, no warnings of libraries."""
    with contextlib.ExitStack() as ending:
        if rank():
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            nowhere = ending.enter_context(open(os.devnull, "w", encoding="utf-8"))
            ending.enter_context(contextlib.redirect_stdout(nowhere))
            ending.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            ending.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
        yield


def tell() -> bool:
    """Whether this process is to tell its error; it waits where the first of its machine may do so for it."""
    local = int(os.environ.get("LOCAL_RANK", rank()))
    claim = _claim()
    end = time.monotonic() + (GRACE_S if local else 0.0)
    while time.monotonic() < end:
        if claim and claim.exists():
            return False
        time.sleep(0.05)
    if claim is None:
        return True
    try:
        claim.open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than not at all
    return True


def named(text: str) -> str:
    """The line of an error, with the rank that it is of, where that is not the first."""
    return f"rank {rank()}: {text}" if rank() else text


def leave(text: str) -> None:
    """Leave the line where torchrun's summary takes it from."""
    file = os.environ.get(FILE)
    if file:
        about = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}), "utf-8")


def told() -> bool:
    """Whether another rank of this machine has told its error: torchrun ends what is left once a rank has failed, and who is
    ended so has no failure to be listed."""
    claim = _claim()
    return bool(claim and claim.exists())


def _claim() -> Path | None:
    """The file that the rank which tells makes; None where torchrun has not started this process."""
    file = os.environ.get(FILE)
    return Path(file).parent.parent / TOLD if file else None
