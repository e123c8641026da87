"""One target fuzzed by atheris in a process of its own, for SECONDS of the processor: FOLDER gets what it did, every few seconds.

    python -m bench.safety.fuzz_child TARGET SECONDS FOLDER SEED SCRATCH

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

INSTRUMENTED = ["cmt_fast", "zipfile", "tarfile", "pickletools", "numpy.lib"]  # yaml is ten times slower so
ROOM = 2 << 30  # bytes of address space beside what the imports took: what asks for more gets a MemoryError
SLOWEST_S = 20.0  # of processor time
EVERY_S = 5.0


class Record:
    """What was done so far, and the cases that found a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun, self.written = folder, time.monotonic(), 0.0
        self.start = time.process_time()
        self.state: dict[str, Any] = {
            "executions": 0,
            "read": 0,
            "refused": 0,
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "faults": {},
        }
        (folder / "faults").mkdir(parents=True, exist_ok=True)

    def fault(self, kind: str, error: BaseException | None, data: bytes) -> None:
        """Keep the first case of each kind and place."""
        trace = traceback.extract_tb(error.__traceback__)[-3:] if error else []
        what = f"{kind} at {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in reversed(trace))}"
        if what not in self.state["faults"]:
            name = hashlib.sha256(what.encode()).hexdigest()[:12]
            (self.folder / "faults" / name).write_bytes(data)
            self.state["faults"][what] = {
                "case": name,
                "said": f"{error}".replace(tempfile.gettempdir(), "FOLDER")[:300],
            }

    def done(self, outcome: str) -> None:
        """One more execution; now and then all of it goes to the disk."""
        self.state["executions"] += 1
        if outcome:
            self.state[outcome] += 1
        if time.monotonic() - self.written > EVERY_S:
            self.write()

    def write(self) -> None:
        """state.json, whole or not at all."""
        self.written = time.monotonic()
        self.state |= {"seconds": self.written - self.begun, "cpu_seconds": time.process_time() - self.start}
        (self.folder / ".state").write_text(json.dumps(self.state), "utf-8")
        (self.folder / ".state").replace(self.folder / "state.json")


def main() -> None:
    import atheris

    target, seconds, seed = sys.argv[1], int(sys.argv[2]), sys.argv[4]
    folder, scratch = Path(sys.argv[3]), Path(sys.argv[5])
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from bench.safety import guard, seeds, targets
        from cmt_fast.safe_pickle import sandbox
    sandbox.read = targets.in_process
    corpus, record = folder / "corpus", Record(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(scratch)

    begun = time.process_time()

    def one(data: bytes) -> None:
        start, outcome = time.process_time(), ""
        try:
            outcome = "refused" if targets.check(target, scratch, data) else "read"
        except (Exception, guard.Forbidden) as error:
            record.fault(type(error).__name__, error, data)
        if time.process_time() - start > SLOWEST_S:
            record.fault(f"more than {SLOWEST_S:.0f} s", None, data)
        record.done(outcome)
        if time.process_time() - begun > seconds:
            record.write()
            os._exit(0)  # libFuzzer counts the clock on the wall, of which a busy machine gives little

    known = targets.TARGETS[target]
    for data in [*known.begin(), *seeds.kept(target).values()]:  # with everything imported that is imported late
        (corpus / hashlib.sha256(data).hexdigest()).write_bytes(data)
        one(data)
    begun = time.process_time()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [
        f"-seed={seed}",
        f"-max_len={known.longest}",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=0", "-timeout=1200", "-verbosity=0", str(corpus)], one)
    try:
        atheris.Fuzz()
    finally:
        record.write()


if __name__ == "__main__":
    main()
