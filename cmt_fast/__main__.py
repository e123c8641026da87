"""`cmt`, `python -m cmt_fast` and `torchrun -m cmt_fast`: a command from the first signal that it may get to the last.

Signals are heard before anything else of ours is imported, and until the interpreter is gone.
"""

import os
import signal
import sys


def main() -> int:
    """The command that the process was started for; its exit code."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(kind) != signal.SIG_IGN:
            signal.signal(kind, lambda number, _: os._exit(128 + number))
    from cmt_fast.runtime import signals

    try:
        with signals.heard():
            with signals.starting():
                from cmt_fast import cli
            code = cli.main()
            signals.last_words()
    except KeyboardInterrupt as error:  # between two of these lines
        code = signals.code_of(error)
    signals.last_words()  # leaving gave back the handlers of before
    return code


if __name__ == "__main__":
    sys.exit(main())
