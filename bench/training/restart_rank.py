"""One rank of a run that `bench restart` starts: `cmt train`, measured to its first step or through its saves.

A script of its own, run by path with a tree's packages on PYTHONPATH, so that a tree of before is measured by the same lines:
`python restart_rank.py JOB.json`. What it finds goes to the file that the job names, one a rank.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this script's folder, whose modules are named as others are

import torch


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(1)
    from cmt_fast import cli
    from cmt_fast.train import batches
    from cmt_fast.train import steps as taking

    read, begun = _counted(), {"cpu": time.process_time(), "io": _rchar()}
    found: dict[str, Any] = {"saves": []}

    def tell() -> None:
        file = Path(job["found"] + f".{os.environ.get('RANK', '0')}")
        file.write_text(json.dumps(found), "utf-8")

    def first(*_: Any) -> None:
        spent = time.process_time() - begun["cpu"]
        found.update(cpu_s=spent, rchar=_rchar() - begun["io"], read=read["hashed"] + read["mapped"], **read)
        tell()
        os._exit(0)

    real = taking.Steps._checkpoint

    def timed(steps: Any, n: int, last: bool, *rest: Any, **more: Any) -> None:
        before = time.perf_counter(), time.thread_time()
        real(steps, n, last, *rest, **more)
        row = {"last": last, "wall_s": time.perf_counter() - before[0], "cpu_s": time.thread_time() - before[1]}
        found["saves"].append(row)
        if last and steps.stage.name == "mid":  # nothing is judged
            found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            tell()
            os._exit(0)

    if job["do"] == "start":
        batches.BatchProvider.draw = first  # type: ignore[method-assign]
    else:
        taking.Steps._checkpoint = timed  # type: ignore[method-assign]
    sys.exit(cli.main(job["arguments"]))


def _counted() -> dict[str, int]:
    """Bytes of checkpoints that are read from now on: hashed, and mapped by the library where it reads them once more."""
    from cmt_fast.storage import checkpoint

    read = {"hashed": 0, "mapped": 0}
    if hasattr(checkpoint, "tensor_file"):
        real_read = checkpoint.tensor_file._read

        def counted(*arguments: Any) -> int:
            got = real_read(*arguments)
            read["hashed"] += got
            return got

        checkpoint.tensor_file._read = counted
        return read
    real_sum, real_open = checkpoint.checksum, checkpoint.safe_open

    def checksum(path: Path) -> str:
        read["hashed"] += path.stat().st_size
        return real_sum(path)

    class Opened:
        def __init__(self, *arguments: Any) -> None:
            self.file = real_open(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            out = self.file.get_tensor(name)
            read["mapped"] += out.nbytes
            return out

    checkpoint.checksum, checkpoint.safe_open = checksum, Opened  # type: ignore[attr-defined]
    return read


def _rchar() -> int:
    """Bytes that this process has asked the kernel to read; what is mapped is not in it."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


if __name__ == "__main__":
    main()
