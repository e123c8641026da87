"""The `cmt` command in a process of its own without the 2 to 3 seconds that importing takes: forked from one that has imported.

`run` starts that one, `python -m tests.train.command_server`, at its first call. Like `python -m cmt_fast` a command has its own
arguments, folder, environment and output, and ends with the exit code of `cmt_fast.cli.main`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def _server() -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.command_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


def run(arguments: tuple[str, ...], cwd: Path | None = None, timeout_s: float = 300.0) -> subprocess.CompletedProcess:
    """Raises subprocess.TimeoutExpired as `subprocess.run` does, the process killed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        request = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": environment,
                   "out": str(out), "err": str(err), "timeout_s": timeout_s}  # fmt: skip
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"the server of commands ended with {server.wait()}"
        code = json.loads(answer)
        said = [path.read_text("utf-8", "replace") for path in (out, err)]
    if code is None:
        raise subprocess.TimeoutExpired(["cmt", *arguments], timeout_s, *said)
    return subprocess.CompletedProcess(["cmt", *arguments], code, *said)


# ------------------------------------------------------------------------------------------------------- the server


def child(request: dict) -> int:
    """What the forked process does."""
    from cmt_fast.cli import main

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["cmt", *request["arguments"]]
    try:
        return main(request["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.setsid()
            os._exit(child(request) & 0xFF)
        late = threading.Event()

        def end(pid: int = pid, late: threading.Event = late) -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

        clock = threading.Timer(request["timeout_s"], end)
        clock.start()
        _, status = os.waitpid(pid, 0)
        clock.cancel()
        clock.join()
        print(json.dumps(None if late.is_set() else os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    import sklearn.datasets  # noqa: F401  imported before the fork, as the data set needs it
    import torch._dynamo  # noqa: F401

    import cmt_fast.cli  # noqa: F401

    serve()
