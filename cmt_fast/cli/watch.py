"""`cmt watch`: runs while they train, on the terminal or as a page on this machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import tempfile
import threading
import time
import webbrowser
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import exits, signals
from cmt_fast.watch import screen, serve
from cmt_fast.watch.state import RunState, Watched, runs_in

REFRESH_S = 10  # after which a served page loads itself anew
DAY_S = 86400
ANY = -1  # --serve without a number


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=watch)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run, or a folder of runs; several are a table")
    p.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    p.add_argument("--once", action="store_true", help="print once and end; so do runs that are finished")
    p.add_argument(
        "--serve", nargs="?", type=int, const=ANY, metavar="PORT",
        help=f"serve the run's page on {serve.address('PORT')}, to this machine alone (default port: {serve.PORT}, or any)",
    )  # fmt: skip
    p.add_argument("--open", action="store_true", help="open the run's page in a browser; it loads itself anew")


def watch(args: argparse.Namespace) -> None:
    if not 0 < args.every <= DAY_S:
        raise ConfigError(f"--every: {args.every} is not a number of seconds above 0, at most {DAY_S}")
    if args.serve is not None and args.serve != ANY and not 0 < args.serve < 65536:
        raise ConfigError(f"--serve: {args.serve} is no port; valid are 1 to 65535")
    folders = [run for folder in args.runs for run in runs_in(folder)]
    if (args.serve is not None or args.open) and len(folders) > 1:
        raise ConfigError(f"RUN: --serve and --open are for one run, {len(folders)} are named; name one of them")
    watched = [Watched(folder) for folder in folders]
    try:
        if args.serve is not None:
            return _serve(watched[0], None if args.serve == ANY else args.serve, args.open)
        if args.open:
            _open(watched[0].folder)
        _look(watched, args.every, args.once)
    except KeyboardInterrupt as error:  # how a person ends it
        if signals.code_of(error) != exits.SIGNAL + signal.SIGINT:
            raise


def _look(watched: list[Watched], every: float, once: bool) -> None:
    """Until all are finished: a page that is drawn anew on a terminal, a line a change elsewhere."""
    console = Console()
    states = [w.look() for w in watched]
    if once or all(s.finished for s in states):
        return console.print(_drawn(states, console.width))
    if not console.is_terminal:
        return _lines(watched, states, every)
    live = Live(_drawn(states, console.width), console=console, auto_refresh=False, screen=True)
    try:
        with live:
            while not all(s.finished for s in states):
                time.sleep(every)
                states = [w.look() for w in watched]
                live.update(_drawn(states, console.width), refresh=True)
    finally:  # the last look stays on the terminal
        console.print(_drawn(states, console.width))


def _lines(watched: list[Watched], states: list[RunState], every: float) -> None:
    said: dict[Path, object] = {}
    while True:
        for state in states:
            news = ([(s.at.state, s.at.nimg, s.evaluations) for s in state.stages], state.life.word)
            if said.get(state.folder) != news:
                print(f"{time.strftime('%H:%M:%S')}  {screen.line(state)}", flush=True)
            said[state.folder] = news
        if all(s.finished for s in states):
            return
        time.sleep(every)
        states = [w.look() for w in watched]


def _drawn(states: list[RunState], width: int) -> RenderableType:
    return screen.page(states[0], width) if len(states) == 1 else screen.overview(states, width)


def _serve(watched: Watched, port: int | None, show: bool) -> None:
    """Serve the page until Ctrl-C."""
    folder = watched.folder
    with contextlib.ExitStack() as ending:
        home = folder
        judged = watched.look().finished and (folder / "report.html").is_file()
        if not judged and not os.access(folder, os.W_OK):  # the page is drawn elsewhere while it is served
            home = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="cmt-watch-")))
        _answer(watched, home, port, show)


def _answer(watched: Watched, home: Path, port: int | None, show: bool) -> None:
    """home: the folder that the page is drawn in."""
    folder = watched.folder

    def draw() -> None:
        from cmt_fast.report import page  # it needs torch, which looking at files does not

        page.write(folder, judge=False, refresh_s=None if watched.look().finished else REFRESH_S, out=home)

    def changed() -> float | None:
        state = watched.look()
        return None if state.finished else state.changed

    with serve.server(folder, serve.Fresh(home / "report.html", draw, changed), port, home) as server:
        url = serve.address(server.server_address[1])
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        if show:
            threading.Timer(0.2, functools.partial(webbrowser.open, url)).start()
        server.serve_forever()


def _open(folder: Path) -> None:
    """The run's page in a browser, from its file."""
    file = folder / "report.html"
    if not file.is_file():
        raise ConfigError(f"--open: {file} is not there yet; a run writes it at its first evaluation, --serve now")
    url = file.resolve().as_uri()
    if not webbrowser.open(url):
        print(f"no browser can be opened here; the page is {url}")
