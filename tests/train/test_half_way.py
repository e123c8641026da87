"""The page that is drawn while a run trains: as often as it is cheap, and never the end of a run."""

from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.train import half_way, loop
from tests.fixtures.tiny import tiny


def test_drawing_takes_a_small_share_of_the_time():
    now, cost, drawn = [0.0], 3.0, []

    def draw():
        drawn.append(now[0])
        now[0] += cost

    page = half_way.HalfWay(draw, lambda: now[0])
    while now[0] < 3000:
        page.draw()
        now[0] += 1
    assert drawn[0] == half_way.GUESS_S / half_way.SHARE
    gaps = [b - a - cost for a, b in zip(drawn, drawn[1:])]
    assert gaps and all(cost / half_way.SHARE <= gap <= cost / half_way.SHARE + 1 for gap in gaps)


def test_a_page_that_cannot_be_drawn_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    asked = []

    def draw():
        asked.append(1)
        raise OSError("the disk\nis full")

    monkeypatch.setattr(half_way, "GUESS_S", 0.0)
    settings = ["pre.images_nimg=128", "pre.eval_every_nimg=32", "eval.n_during=20"]
    loop.train(Workspace(tiny("digits", *settings), tmp_path / "run"), ["pre"], draw=draw)
    assert checkpoint.complete(tmp_path / "run" / "pre").manifest["done"] and len(asked) == 1
    assert capsys.readouterr().err.count("report.html is not drawn while the run trains (the disk is full)") == 1
