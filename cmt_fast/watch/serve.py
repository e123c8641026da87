"""The page of a run on 127.0.0.1:PORT by plain HTTP, for a browser on this machine or behind `ssh -L`.

It serves the report and the pictures of samples, by a list of names: nothing else of the disk, no listing, no links that lead
out of the run. It answers this machine alone, and only requests that were meant for it (the Host header), so that a foreign
page in the same browser cannot read it.
"""

from __future__ import annotations

import http.server
import re
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES

HOST, PORT = "127.0.0.1", 8300
SERVED = re.compile(rf"report\.(html|md)|report/[\w-]+\.(svg|png)|({'|'.join(STAGES)})/grids/\d+\.png")
KINDS = {
    "html": "text/html; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
}
SCHEME = "http"  # nothing leaves this machine
REST_S = 10.0  # between two drawings of the page


class Fresh:
    """Draws RUN/report.html again where the run has gone on since. One that cannot be drawn is a line, and the old one is served.

    changed: when the run was last written to, None once it is finished: its last page is `cmt train`'s, judged and whole.
    """

    def __init__(
        self, file: Path, draw: Callable[[], object], changed: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.file, self.draw, self.changed, self.clock = file, draw, changed, clock
        self.lock, self.last, self.said = threading.Lock(), float("-inf"), ""

    def __call__(self) -> None:
        with self.lock:
            newest = self.changed()
            drawn = self.file.stat().st_mtime if self.file.is_file() else None
            stale = drawn is None or (newest is not None and newest > drawn)
            if not stale or self.clock() - self.last < REST_S:
                return
            try:
                self.draw()
            except Exception as error:
                text = " ".join(str(error).split()) or type(error).__name__
                if text != self.said:
                    print(f"cmt: report.html is not drawn anew ({text[:300]})", file=sys.stderr, flush=True)
                self.said = text
            self.last = self.clock()


def server(
    run: Path, fresh: Callable[[], None], port: int | None = None, home: Path | None = None
) -> http.server.ThreadingHTTPServer:
    """Bound and not yet serving. port: None takes PORT, or any that is free; home: where the page is, by default the run.

    Raises ConfigError for a port that is taken.
    """

    class Handler(_Handler):
        places, before = (home or run, run), staticmethod(fresh)

    for choice in (port,) if port is not None else (PORT, 0):
        try:
            return http.server.ThreadingHTTPServer((HOST, choice), Handler)
        except OSError as error:
            refused = error
    raise ConfigError(
        f"--serve: port {port} cannot be had ({refused.strerror}); without a number any free one is taken"
    )


def address(port: int | str) -> str:
    """Where a browser finds it."""
    return f"{SCHEME}://{HOST}:{port}/"


def served(run: Path, path: str) -> Path | None:
    """The file that a request's path means; None for what is not served."""
    name = unquote(urlsplit(path).path).lstrip("/") or "report.html"
    if not SERVED.fullmatch(name):
        return None
    file, home = (run / name).resolve(), run.resolve()
    return file if home in file.parents and file.is_file() else None


class _Handler(http.server.BaseHTTPRequestHandler):
    places: tuple[Path, Path]  # of the page, of the run
    before: Callable[[], None]
    server_version, sys_version = "cmt", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        name = (self.headers.get("Host") or "").partition(":")[0]  # the port may be another, behind `ssh -L`
        if name not in (HOST, "localhost"):
            return self._refuse(HTTPStatus.FORBIDDEN)
        if urlsplit(self.path).path in ("/", "/report.html"):
            self.before()
        file = next((f for folder in dict.fromkeys(self.places) if (f := served(folder, self.path))), None)
        if file is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        data = file.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", KINDS[file.suffix[1:]])
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, status: HTTPStatus) -> None:
        """Without a page that says anything of the disk."""
        data = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed."""
