"""Imports the trainer once, then trains in forked children: `python kill_server.py CONFIG.json OUT STAGE`.

Reads one line a child: a number of seconds, after which the child gets SIGKILL, or `end` to let it finish. Answers
`killed`, `done` or `failed`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401  imported before the fork, as the data set needs it
import torch

from cmt_fast import config, loop
from cmt_fast.workspace import Workspace


def child(run, out: Path, stage: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    loop.train(Workspace(run, out), [stage])


def main() -> None:
    torch.set_num_threads(1)
    run, out, stage = config.build(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), sys.argv[3]
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(run, out, stage)
                code = 0
            finally:
                os._exit(code)
        if line.strip() != "end":
            time.sleep(float(line))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        answer = "killed" if os.WIFSIGNALED(status) else "done" if os.WEXITSTATUS(status) == 0 else "failed"
        print(answer, flush=True)


main()
