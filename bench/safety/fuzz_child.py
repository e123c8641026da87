"""One target fuzzed by atheris in a process of its own, which libFuzzer ends: FOLDER gets what it did, every few seconds.

    python -m bench.safety.fuzz_child TARGET SECONDS FOLDER SEED

A fault does not end it: the case is kept in FOLDER/faults by where it was raised, and the time is used to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

INSTRUMENTED = ["cmt_fast", "zipfile", "tarfile", "pickletools", "yaml", "numpy.lib"]
ROOM = 2 << 30  # bytes of address space beside what the imports took: what asks for more gets a MemoryError
SLOWEST_S = 20.0


def main() -> None:
    import atheris

    target, seconds, folder, seed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from bench.safety import guard, seeds, targets
        from cmt_fast.safe_pickle import sandbox
    sandbox.read = targets.in_process
    scratch, corpus = folder / "scratch", folder / "corpus"
    for made in (scratch, corpus, folder / "faults"):
        made.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(scratch)
    state: dict[str, Any] = {"executions": 0, "read": 0, "refused": 0, "faults": {}, "seconds": 0.0}
    begun = written = time.monotonic()

    def fault(kind: str, error: BaseException | None, data: bytes) -> None:
        last = (
            [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-3:]
            if error
            else []
        )
        what = f"{kind} at {' < '.join(reversed(last))}"
        if what not in state["faults"]:
            name = hashlib.sha256(what.encode()).hexdigest()[:12]
            (folder / "faults" / name).write_bytes(data)
            state["faults"][what] = {"case": name, "said": f"{error}"[:300]}

    def one(data: bytes) -> None:
        nonlocal written
        start = time.monotonic()
        try:
            state["refused" if targets.check(target, scratch, data) else "read"] += 1
        except (Exception, guard.Forbidden) as error:
            fault(type(error).__name__, error, data)
        state["executions"] += 1
        now = time.monotonic()
        if now - start > SLOWEST_S:
            fault(f"{now - start:.0f} s", None, data)
        if now - written > 5:
            written, state["seconds"] = now, now - begun
            (folder / ".state").write_text(json.dumps(state), "utf-8")
            (folder / ".state").replace(folder / "state.json")

    begin = [*targets.TARGETS[target].begin(), *seeds.kept(target).values()]
    for data in begin:  # outside the limit, and with everything imported that is imported late
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
        one(data)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        "-rss_limit_mb=0",
        "-timeout=120",
        "-max_len=8192",
        "-verbosity=0",
    ]
    written = 0.0
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    try:
        atheris.Fuzz()
    finally:
        state["seconds"] = time.monotonic() - begun
        (folder / "state.json").write_text(json.dumps(state), "utf-8")


if __name__ == "__main__":
    main()
