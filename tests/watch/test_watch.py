"""`cmt watch`: what it says of a run half-way, finished, dead or moved; and what it serves to a browser, and what not."""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import threading

import pytest
from rich.console import Console

from cmt_fast.cli import watch as command
from cmt_fast.config import loading
from cmt_fast.watch import screen, serve
from cmt_fast.watch.state import Watched
from tests.fixtures.tiny import tiny

NOW = 1_900_000_000.0  # long after anything else on the disk was written


def begin(folder, *more):
    """A run of which nothing is trained."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"digest": "", "run": loading.dump(tiny("digits", *more)), "rows": {}}))
    return folder


def train(run, stage, steps, figures=None, done=False, before=0):
    """Rows of metrics as a stage of batch 32 leaves them at 100 images/s, an evaluation of a second every ten steps."""
    folder = run / stage
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for n in range(before + 1, steps + 1):
            bill = {"amounts": {"core": {"train": {"seconds": 4.0 * n}}}}
            wall = {"train_s": 0.32 * n, "eval_s": float((n - 1) // 10), "bill": bill}
            file.write(json.dumps({"kind": "train", "step": n, "nimg": 32 * n, "loss": 8.0 / n, "wall": wall}) + "\n")
            if n % 10 == 0:
                steps_of = {k: {"frechet": value} for k, value in (figures or {}).get(n, {}).items()}
                row = {"kind": "eval", "step": n, "nimg": 32 * n, "steps": steps_of, "wall": {}}
                file.write(json.dumps(row) + "\n")
    manifest = folder / "checkpoints" / f"step-{steps:08d}" / "manifest.json"
    manifest.write_text(json.dumps({"done": done, "nimg": 32 * steps}))
    return folder


def alive(run, age=0.0, pulse=None):
    """The signs of life that a run leaves. age: seconds since it last did something; pulse: since its process was there."""
    (run / "heartbeat").write_text(str(NOW - age))
    os.utime(run / "heartbeat", (NOW - age, NOW - age))
    if pulse is not None:
        file = run / "mid" / "bill.alive"
        file.write_text("")
        os.utime(file, (NOW - pulse, NOW - pulse))


@pytest.fixture
def half_way(tmp_path, monkeypatch):
    """`pre` is finished, `mid` is at 12 of 20 steps: better in one step than ever, and worse in two than at step 10."""
    monkeypatch.setattr("time.time", lambda: NOW)
    run = begin(tmp_path / "runs" / "half")
    train(run, "pre", 20, done=True)
    train(run, "mid", 10, {10: {"1": 40.0, "2": 20.0}})
    alive(run)
    return run


def printed(state, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(screen.page(state, width))
    return console.file.getvalue()


def test_a_run_half_way(half_way):
    watched = Watched(half_way)
    watched.look()
    train(half_way, "mid", 20, {20: {"1": 30.0, "2": 25.0}}, before=10)
    (half_way / "mid" / "checkpoints" / "step-00000020" / "manifest.json").unlink()  # the last one is being written
    state = watched.look()
    pre, mid, post, control = state.stages
    assert [s.state for s in state.stages] == ["done", "begun", "waiting", "waiting"] and state.now == mid
    assert (mid.nimg, mid.total_nimg, mid.share) == (640, 640, 1.0)
    assert mid.speed == pytest.approx(100.0) and mid.left_s == 0.0
    assert mid.evaluations == {"1": [(320, 40.0), (640, 30.0)], "2": [(320, 20.0), (640, 25.0)]}
    text = printed(state)
    for words in ("mid at 640", "this one", "20 at 320", "alive 0 s ago", "Fréchet distance, 100 samples"):
        assert words in text


def test_what_is_left_counts_evaluations_as_often_as_so_far(half_way):
    train(half_way, "mid", 15, before=10)
    mid = Watched(half_way).look().now
    assert mid.left_s == pytest.approx(5 * 0.32 * (15 * 0.32 + 1.0) / (15 * 0.32))


def test_a_run_that_goes_on_from_a_checkpoint_is_read_anew(half_way):
    watched = Watched(half_way)
    assert watched.look().now.nimg == 320
    new = half_way / "mid" / "metrics.tmp"
    new.write_text("".join((half_way / "mid" / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]))
    (half_way / "mid" / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    os.replace(new, half_way / "mid" / "metrics.jsonl")
    assert watched.look().now.nimg == 4 * 32
    with open(half_way / "mid" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a row that is being written
    assert watched.look().now.nimg == 4 * 32


@pytest.mark.parametrize(
    "age, pulse, life, mood",
    [
        (3, 1, "alive 1 s ago", "good"),
        (600, 2, "alive 2 s ago", "good"),  # an evaluation that takes long
        (1200, 2, "its process lives, but has done nothing for 20 min", "bad"),
        (300, 300, "no sign of life for 5 min", "waiting"),
        (7200, 7200, "no sign of life for 2 h 0 min: `cmt doctor --heartbeat", "bad"),
        (7200, None, "stopped 2 h 0 min ago; the same `cmt train` goes on", "waiting"),
    ],
)
def test_signs_of_life(age, pulse, life, mood, half_way):
    alive(half_way, age, pulse)
    state = Watched(half_way).look()
    assert state.life.startswith(life) and state.mood == mood


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_nothing_is_cut_where_a_terminal_is_wide_enough(width, half_way):
    lines = printed(Watched(half_way).look(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert width < 80 or not any("…" in line for line in lines)


def asked(*runs, every=0.01, once=False, port=None, show=False):
    command.watch(argparse.Namespace(runs=list(runs), every=every, once=once, serve=port, open=show))


def finish(run):
    for stage, steps in (("mid", 20), ("post", 20), ("control", 40)):
        train(run, stage, steps, {20: {"1": 3.0, "2": 2.0}}, done=True)


def test_without_a_terminal_it_says_what_is_new_until_the_end(half_way, monkeypatch, capsys):
    looks = []

    def rest(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            finish(half_way)

    monkeypatch.setattr(command.time, "sleep", rest)
    asked(half_way, every=7)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and looks == [7, 7, 7]  # what is not new is not said again
    assert "digits: mid 50 %  320/640 images  100 images/s" in lines[0] and "finished" in lines[1]


def test_a_finished_run_is_printed_once_and_a_folder_of_runs_is_a_table(half_way, capsys):
    finish(half_way)
    asked(half_way)
    assert capsys.readouterr().out.count("\n finished") == 1
    train(begin(half_way.parent / "other"), "pre", 5)
    asked(half_way.parent, once=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    (half,), (other,) = ([row for row in rows if row[0] == name] for name in ("half", "other"))
    assert half[1:4] == ["done", "100", "%"] and half[6:8] == ["3", "2"]
    assert other[1:4] == ["pre", "5", "%"] and other[4] == "100"


@pytest.fixture
def served(half_way):
    """(the run, what a path gives: status and text). It holds links that lead out, and files that are nobody's business."""
    outside = half_way.parent / "secret.png"
    outside.write_text("secret")
    (half_way / "report.html").write_text("the page")
    (half_way / "report").mkdir()
    (half_way / "report" / "x.svg").write_text("a picture")
    (half_way / "report" / "out.svg").symlink_to(outside)
    (half_way / "mid" / "grids").mkdir()
    (half_way / "mid" / "grids" / "00000010.png").write_text("samples")
    (half_way / "post").symlink_to(half_way.parent)
    (half_way.parent / "grids").mkdir()
    (half_way.parent / "grids" / "1.png").write_text("secret")
    drawn = []
    with serve.server(half_way, lambda: drawn.append(1), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def get(path, method="GET", host=None):
            client = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
            client.putrequest(method, path, skip_host=True)
            client.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
            client.endheaders()
            answer = client.getresponse()
            return answer.status, answer.read().decode()

        assert server.server_address[0] == "127.0.0.1"
        yield get, drawn
        server.shutdown()
        thread.join()


def test_the_page_and_its_pictures_are_served(served):
    get, drawn = served
    assert get("/") == get("/report.html?x=1") == (200, "the page") and len(drawn) == 2
    assert get("/report/x.svg") == (200, "a picture") and get("/mid/grids/00000010.png") == (200, "samples")
    assert get("/", "HEAD") == (200, "") and len(drawn) == 3


@pytest.mark.parametrize(
    "path",
    ["/run.json", "/mid/metrics.jsonl", "/mid/", "/report/", "/../secret.png", "/%2e%2e/secret.png", "/report/../run.json",
     "/report/..%2f..%2fsecret.png", "//etc/passwd", "/report/out.svg", "/post/grids/1.png", "/mid/checkpoints",
     "/report/x.svg%00.png", "/report/..\\run.json"],
)  # fmt: skip
def test_nothing_else_of_the_disk_is_served(path, served):
    status, text = served[0](path)
    assert status == 404 and text == "404 Not Found\n"


def test_a_page_of_another_site_and_a_writer_are_refused(served):
    get, drawn = served
    assert get("/", host="evil.example:80")[0] == get("/", host="localhost.evil.example")[0] == 403 and not drawn
    assert get("/", host="localhost:9000")[0] == 200  # as behind ssh -L 9000:127.0.0.1:8300
    assert get("/report.html", "PUT")[0] == 501 and get("/", "POST")[0] == 501


def test_a_served_page_is_drawn_again_where_the_run_went_on(tmp_path, capsys):
    file, drawn, now, newest = tmp_path / "report.html", [], [0.0], [1.0]

    def draw():
        drawn.append(now[0])
        file.write_text("")
        if len(drawn) == 2:
            raise OSError("half a file")

    fresh = serve.Fresh(file, draw, lambda: newest[0], lambda: now[0])
    fresh()  # it is not there yet
    fresh()
    assert drawn == [0.0]
    newest[0] = file.stat().st_mtime + 1
    fresh()  # the run went on, a moment ago
    assert drawn == [0.0]
    now[0] += serve.REST_S
    fresh()
    assert drawn == [0.0, serve.REST_S] and "half a file" in capsys.readouterr().err
    newest[0] = None  # it is finished
    now[0] += 10 * serve.REST_S
    fresh()
    assert len(drawn) == 2
