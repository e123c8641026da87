"""The page of a run while it trains: drawn at evaluations, cheap, and never the end of a run."""

from __future__ import annotations

from cmt_fast.report import page
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import half_way, loop
from tests.fixtures.tiny import metrics, tiny

SHORT = ["pre.images_nimg=64", "pre.eval_every_nimg=32", "eval.n_during=20"]


def test_a_page_is_drawn_as_often_as_it_is_cheap():
    now, drawn = [0.0], []

    def page() -> None:
        drawn.append(now[0])
        now[0] += 1.0  # what a page takes

    pages = half_way.HalfWay(page, lambda: now[0])
    while now[0] < 200:
        pages.draw()
        now[0] += 5.0
    assert drawn[0] == 20.0 and all(50 <= b - a - 1.0 < 56 for a, b in zip(drawn, drawn[1:])) and len(drawn) == 4


def test_a_run_whose_page_cannot_be_drawn_says_so_once_and_ends_alike(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(half_way, "GUESS_S", 0.0)

    def refuse() -> None:
        raise OSError("disk\nfull")

    loop.train(Workspace(tiny("digits", *SHORT), tmp_path / "refused"), ["pre"], draw=refuse)
    said = capsys.readouterr().err
    assert (
        said.count("the page of pre after 32 images failed (disk full); training goes on") == 1 == said.count("failed")
    )
    loop.train(Workspace(tiny("digits", *SHORT), tmp_path / "alone"), ["pre"])
    rows = metrics(tmp_path / "refused" / "pre")
    failed = {"kind": "failed", "step": 1, "nimg": 32, "what": "the page", "error": "disk full"}
    assert [row for row in rows if row != failed] == metrics(tmp_path / "alone" / "pre") and failed in rows


def test_the_page_is_there_while_the_stage_still_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(half_way, "GUESS_S", 0.0)
    texts = []

    def draw() -> None:
        page.write(tmp_path, judge=False, refresh_s=30)
        texts.append((tmp_path / "report.html").read_text())

    loop.train(Workspace(tiny("digits", *SHORT), tmp_path), ["pre"], draw=draw)
    assert texts and all('<meta http-equiv="refresh" content="30">' in text for text in texts)
    assert "pre 50% of 64 images" in texts[0]


def test_train_hands_the_page_down(tmp_path, monkeypatch):
    """`cmt train` draws without judging, and with judging at the end."""
    from cmt_fast import cli
    from cmt_fast.cli import train

    calls, given = [], []
    monkeypatch.setattr(train.page, "write", lambda *a, **more: calls.append((a, more)))
    monkeypatch.setattr(train, "_done", lambda *_: "")
    monkeypatch.setattr(train.loop, "train", lambda work, names, profile, draw: given.append(draw))
    assert cli.main(["train", "digits", *SHORT, "--stages", "pre", "--out", str(tmp_path / "run")]) == 0
    given[0]()
    assert calls == [
        ((tmp_path / "run",), {"training": True}),
        ((tmp_path / "run",), {"judge": False, "refresh_s": 30}),
    ]
