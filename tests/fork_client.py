"""A process that stands for the child which a server of forked.py forks for it: `fork_client.py ADDRESS ARGUMENTS...`.

It imports little, so that it starts in milliseconds.
"""

import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def main() -> None:
    address, *arguments = sys.argv[1:]
    import json

    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ), "group": os.getpgrp()}
    body = json.dumps(request).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a child to pass them on to
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [f"{len(body):8}".encode()], [0, 1, 2])
    server.sendall(body)
    child = int(server.recv(8, socket.MSG_WAITALL))
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for number in (0, 1):  # the child's alone: who reads or writes them sees it end
        os.close(number)
    said = server.recv(8, socket.MSG_WAITALL)
    code = int(said) if said else 1
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
