"""`cmt watch`: what it says of runs of which the files are known, that it writes nothing, and what it serves."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from cmt_fast import cli
from cmt_fast.cli import watch as command
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import words
from cmt_fast.storage import checkpoint
from cmt_fast.watch import screen, serve
from cmt_fast.watch.state import Watched, runs_in
from tests.fixtures.tiny import tiny

NOW = 1_800_000_000.0


def row(kind: str, step: int, seconds: float = 0.0, **values) -> str:
    wall = {
        "train_s": seconds,
        "eval_s": seconds / 10,
        "bill": {"amounts": {"gpu": {"train": {"seconds": 8 * seconds}}}},
    }
    return json.dumps({"kind": kind, "step": step, "nimg": 32 * step, **values, "wall": wall}) + "\n"


def stamp(path: Path, when: float, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (when, when))


def done(step: int, nimg: int) -> str:
    """The manifest of a finished stage."""
    return checkpoint.signed({"format": checkpoint.FORMAT, "step": step, "nimg": nimg, "done": True, "files": {}})


@pytest.fixture
def run(tmp_path) -> Path:
    """pre is done; mid is at step 12 of 20, 640 images, at 16 images/s; post and control wait."""
    folder = tmp_path / "runs" / "a"
    stamp(folder / "run.json", NOW, json.dumps({"run": loading.dump(tiny()), "parents": None}))
    stamp(
        folder / "pre" / "metrics.jsonl",
        NOW,
        "".join(row("train", n, 2.0 * n, loss=9.0 - n / 10) for n in range(1, 21)),
    )
    manifest = done(20, 640)
    stamp(folder / "pre" / "checkpoints" / "step-00000020" / "manifest.json", NOW - 100, manifest)
    stamp(folder / "pre" / "figures.json", NOW, json.dumps({"during": {"16": {"frechet": 1.25}}}))
    lines = [row("train", n, 2.0 * n, loss=1 / n) for n in range(1, 13)]
    lines.insert(8, row("eval", 8, 16.0, steps={"1": {"frechet": 3.0}, "2": {"frechet": 2.0}}))
    lines.append(row("eval", 12, 24.0, steps={"1": {"frechet": 4.0}, "2": {"frechet": 1.5}}))
    stamp(folder / "mid" / "metrics.jsonl", NOW, "".join(lines))
    stamp(folder / "mid" / "bill.alive", NOW - 3)
    stamp(folder / "heartbeat", NOW - 20)
    return folder


def text_of(renderable, width: int = 120) -> str:
    console = Console(width=width, file=open(os.devnull, "w", encoding="utf-8"), record=True)  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_what_it_says_of_a_run(run):
    state = Watched(run).look(NOW)
    pre, mid, post, control = state.stages
    assert [s.at.state for s in state.stages] == ["finished", "60%", "not begun", "not begun"] and not state.finished
    assert pre.at.done and mid.begun and post.waiting and control.waiting
    assert (mid.at.nimg, mid.at.share) == (384, 0.6) and state.now == mid
    assert mid.speed == pytest.approx(16) and mid.left_s == pytest.approx(256 / 16 * 1.1)
    assert mid.evaluations["1"] == [(256, 3.0), (384, 4.0)] and state.teacher == (16, 1.25)
    assert (state.life.text, state.life.word) == ("alive 3 s ago", "alive")
    for width in (80, 120):
        lines = text_of(screen.page(state, width), width).splitlines()
        said = "\n".join(lines)
        assert "mid" in said and "60 %" in said and "384 of 640" in said and "18 s" in said
        assert "teacher, 16 steps" in said and "3 at 256" in said and "this one" in said and "…" not in said
        assert all(len(line.rstrip()) <= width for line in lines)
    assert "18 s left of mid, then post, control" in said
    for renderable in (screen.page(state, 40), screen.overview([state, state], 40)):
        said = text_of(renderable, 40)
        assert (
            all(word in said for word in ("mid", "60 %" if "left" in said else "32 %", "4", "1.5")) and "…" not in said
        ), said
    one = screen.line(state)
    assert one.startswith("digits: mid 60 %  384/640 images  16 images/s  18 s left") and "Fréchet 4 in 1 step" in one


@pytest.mark.parametrize(
    "beat, pulse, said, word",
    [
        (400, 3, "alive 3 s ago", "alive"),
        (1200, 3, "its process lives, but has done nothing for 20 min", "hangs"),
        (30, None, "alive 30 s ago", "alive"),
        (-7300, 3, "its last sign of life is 2 h ahead of this clock", "ahead"),
        (400, None, "stopped 7 min ago; the same `cmt train` goes on", "stopped"),
        (400, 400, "no sign of life for 7 min", "quiet"),
        (1200, 1200, "no sign of life for 20 min: `cmt doctor --heartbeat ", "lost"),
    ],
)
def test_signs_of_life(run, beat, pulse, said, word):
    stamp(run / "heartbeat", NOW - beat)
    alive = run / "mid" / "bill.alive"
    alive.unlink() if pulse is None else stamp(alive, NOW - pulse)
    life = Watched(run).look(NOW).life
    assert life.text.startswith(said) and life.word == word


def test_a_finished_run_is_printed_once(run, capsys):
    for name in ("mid", "post", "control"):
        stamp(run / name / "checkpoints" / "step-00000020" / "manifest.json", NOW, done(20, 640))
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    assert cli.main(["watch", str(run), "--every", "1000"]) == 0
    assert "finished" in capsys.readouterr().out
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before, "it wrote to the run"


def test_several_runs_are_a_table(run, capsys):
    other = run.with_name("b")
    stamp(other / "run.json", NOW, json.dumps({"run": loading.dump(tiny()), "parents": str(run)}))
    assert cli.main(["watch", str(run.parent), "--once"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("a ", "b ", "mid", "@1", "has not been alive yet"))
    assert Watched(other).look(NOW).stages[0].at.folder == run / "pre", "its pre is the other run's"


def test_lines_where_there_is_no_terminal(run, monkeypatch, capsys):
    """A line at first, one for a change, none while nothing happens."""
    looks = [0]

    def sleep(_):
        looks[0] += 1
        if looks[0] == 2:
            with open(run / "mid" / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(row("train", 13, 26.0, loss=0.1))
        if looks[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert cli.main(["watch", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "384/640" in said[0] and "416/640" in said[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "RUN: 'nowhere' is no run, it has no run.json"),
        (["RUN", "--every", "0"], "--every: 0.0 is not a number of seconds above 0"),
        (["RUN", "--every", "inf"], "--every: inf is not a number of seconds above 0"),
        (["RUN/mid"], "RUN: 'RUN/mid' is no run, it has no run.json, nor has a folder in it; it is a part of 'RUN'"),
        (["RUN", "--serve", "99999"], "--serve: 99999 is no port; valid are 1 to 65535"),
        (["RUN", "RUN", "--serve"], "--serve and --open are for one run, 2 are named"),
        (["RUN", "--open"], "report.html is not there yet"),
    ],
)
def test_what_is_wrong_is_one_line(run, capsys, arguments, said):
    assert cli.main(["watch", *(a.replace("RUN", str(run)) for a in arguments)]) == 2
    err = capsys.readouterr().err.replace(str(run), "RUN")
    assert said in err and err.count("\n") == 1


@pytest.fixture
def site(run):
    """The run's page on a free port, and how often it was drawn."""
    drawn = []

    def draw():
        drawn.append(1)
        (run / "report.html").write_text(f"<p>{len(drawn)}</p>")

    stamp(run / "mid" / "grids" / "00000008.png", NOW, "png")
    stamp(run.parent / "secret.png", NOW, "secret")
    (run / "mid" / "grids" / "00000009.png").symlink_to(run.parent / "secret.png")
    server = serve.server(run, serve.Fresh(run / "report.html", draw, lambda: NOW), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1], drawn
    server.shutdown()
    server.server_close()
    thread.join()


def get(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_it_serves_the_page_and_the_pictures_and_nothing_else(site):
    port, drawn = site
    assert get(port, "/") == get(port, "/report.html?x=1") == (200, "<p>1</p>") and drawn == [1]
    assert get(port, "/mid/grids/00000008.png") == (200, "png")
    assert get(port, "/", method="HEAD") == (200, "")
    for path in ("/run.json", "/mid/", "/mid/grids/", "/../secret.png", "/%2e%2e/secret.png", "/mid/grids/../../run.json",
                 "/mid/grids/00000009.png", "//etc/passwd", "/mid/grids/00000007.png", "/mid/metrics.jsonl"):  # fmt: skip
        assert get(port, path) == (404, "404 Not Found\n"), path
    assert get(port, "/", host="evil.example")[0] == get(port, "/", host="localhost.evil.example:80")[0] == 403
    assert get(port, "/", host="localhost:9000")[0] == 200, "behind `ssh -L 9000:127.0.0.1:8300`"
    assert get(port, "/", method="POST")[0] == 501


def test_a_port_that_is_taken_is_one_line(site, run):
    with pytest.raises(ConfigError, match=f"--serve: port {site[0]} cannot be had"):
        serve.server(run, lambda: None, site[0])


def test_a_page_is_drawn_again_where_the_run_went_on(tmp_path, capsys):
    file, clock, newest, drawn = tmp_path / "report.html", [0.0], [NOW], []

    def draw():
        drawn.append(clock[0])
        if len(drawn) == 3:
            raise OSError("no room")
        stamp(file, newest[0])

    fresh = serve.Fresh(file, draw, lambda: newest[0], lambda: clock[0])
    for t, when in ((0, NOW), (50, NOW), (60, NOW + 1), (62, NOW + 2), (80, NOW + 2), (99, None)):
        clock[0], newest[0] = float(t), when
        fresh()
    assert drawn == [0.0, 60.0, 80.0], "not again within REST_S, nor of a finished run"
    assert capsys.readouterr().err == "cmt: report.html is not drawn anew (no room)\n"


def test_it_needs_no_torch_and_ends_on_ctrl_c(run):
    code = (
        "import signal, sys, cmt_fast.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background begins with it ignored\n"
        "c.main(['watch', sys.argv[1], '--once']), c.main(['runs', 'ls', sys.argv[1]])\n"
        "print('torch' in sys.modules, flush=True)\nsys.exit(c.main(['watch', sys.argv[1], '--serve']))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    try:
        lines = iter(child.stdout.readline, "")
        assert next(line for line in lines if line in ("True\n", "False\n")) == "False\n"
        assert "http://127.0.0.1:" in next(lines)
        time.sleep(0.05)
        child.send_signal(2)
        assert child.wait(10) == 0
    finally:
        child.kill()


def test_words(tmp_path):
    ages = ["0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "2 d", "2 d", "12 d"]
    assert [words.about(s) for s in (-5, 0.4, 119, 119.6, 7139, 7199.9, 172_000, 172_799.9, 1_036_800)] == ages
    assert screen.sparkline([1, 10, 100, float("nan")]) == "▁▅█" and screen.sparkline([3.0, 3.0]) == "▁▁"
    assert screen.sparkline([1.0]) == "" and len(screen.sparkline(range(1, 999))) == screen.POINTS
    assert [screen.short(n) for n in (99_999, 128_000, 1_280_000)] == ["99,999", "128k", "1.28M"]
    with pytest.raises(ConfigError, match="is no run"):
        runs_in(tmp_path)
