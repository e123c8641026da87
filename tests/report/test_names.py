"""Names that others gave (classes, runs, folders) with HTML, Markdown, mathematics, control characters, escapes to a terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from rich.console import Console

from cmt_fast.data import classes
from cmt_fast.data.rows import Dataset
from cmt_fast.render import grids, look, plots, templates

BAD = (
    "<img src=x onerror=alert(1)>", "$\\frac{", "_hidden", "a\x1b]0;title\x07b", "\x1b[2J", "up\x00down\x85", "\u202eright", 
    "x\ud800y",
    "two\nlines\r", "`code` | **b** [l](javascript:x)", "é – ü", "{{ 7 * 7 }} {% x %}", "",
)  # fmt: skip


def plain(text: str, more: str = "\n") -> bool:
    return all(c.isprintable() or c in more for c in text)


def test_names_of_classes_are_shown_printable_and_the_usual_ones_as_they_are():
    data = Dataset(torch.zeros(len(BAD), 2), torch.arange(len(BAD)), len(BAD), "", BAD)
    shown = classes.names(data)
    assert all(map(plain, shown, [""] * len(BAD))) and "\n" not in "".join(shown)
    assert [n for n in shown if n in BAD] == [n for n in BAD if n.isprintable()]
    assert plain(classes.line(data), "")


def page(names: list[str]) -> list[templates.Section]:
    """A page with the names in every place that takes words."""
    words, every = list(names), " ".join(names)
    table = templates.Table(every, words, [words], note=every)
    picture = templates.Picture(every, "p.svg", svg=plots.svg(every, lambda axes: axes.plot([1, 2])), note=every)
    first = templates.Section("", words, [], headlines=[(every, every)], alerts=words, subtitle=every)
    return [first, templates.Section(every, words, [templates.Group([table, picture], note=every)], every, every)]


class Tags(HTMLParser):
    """The elements and attributes of a page, as a browser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))


def test_pages_hold_a_name_as_text_and_nothing_that_acts():
    tame, wild = (
        Tags(templates.html("x", page(names), banner=names[0])) for names in ([f"n{k}" for k in range(len(BAD))], BAD)
    )
    texts = [made(BAD[k], page(BAD), banner=BAD[k]) for k in (3,) for made in (templates.html, templates.markdown)]
    assert all(plain(text, "\n\t\xa0") for text in texts)
    tags = [{tag for tag, _ in page.found} for page in (wild, tame)]
    words = [{word for _, names in page.found for word in names} for page in (wild, tame)]
    assert tags[0] <= tags[1] | {"code", "pre"} and words[0] <= words[1]  # no element and no attribute came of a name
    assert "{{ 7 * 7 }}" in texts[0]
    body = re.sub(r"\\.", "", texts[1].partition("<details>")[0])  # less what is escaped
    assert "<" not in re.sub(r"<!--.*?-->", "", body) and "](javascript" not in body and "**b**" not in body


@pytest.mark.parametrize("name", BAD)
def test_a_terminal_gets_no_escape_of_a_name(name, monkeypatch, capsys):
    table = templates.Table(name, [name, "b"], [[name, "1"], ["x", "2"]])
    templates.show(table)
    out = capsys.readouterr().out
    assert plain(out) and len(out.splitlines()) == 4
    drawn = io.StringIO()
    monkeypatch.setattr(
        templates, "Console", lambda: Console(file=drawn, force_terminal=True, color_system=None, width=200)
    )
    templates.show(table)
    assert plain(re.sub(r"\x1b\[[0-9;]*m", "", drawn.getvalue()))


def test_pictures_are_drawn_whatever_classes_and_runs_are_called(tmp_path):
    n = len(BAD)
    points = look.Look(BAD[1], torch.randn(n, 2), list(BAD), torch.randn(2, 9), [(name, 3) for name in BAD], list(BAD))
    look.draw(points, tmp_path / "points.png")
    look.draw(points._replace(samples=torch.rand(2, 1, 4, 4), names=list(BAD[1:3]), counts=[]), tmp_path / "tiles.png")
    look.draw(points._replace(names=[""] * n, counts=[]), tmp_path / "bare.png")  # no legend to draw
    grids.grid([("x", torch.rand(2, 1, 4, 4))], tmp_path / "a.png")
    grids.beside(BAD, [("mid", [(tmp_path / "a.png", "1 step")] * n)], tmp_path / "beside.png")
    for file in ("points.png", "tiles.png", "beside.png"):
        assert Image.open(tmp_path / file).size[0] > 200
