"""The report's page as data, and its three renderings: HTML, Markdown, terminal.

A page is a list of sections of tables and pictures; the templates beside this file know nothing of training.
"""

from __future__ import annotations

import base64
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cmt_fast.runtime.words import one_line, printable


class Table(NamedTuple):
    """head and rows of text; left: how many columns are left-aligned text; strong: how many last rows are in bold."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1
    strong: int = 0
    kind: str = "table"


class Picture(NamedTuple):
    """file: its name in the folder beside the Markdown; svg: the element's text, or else base64 of a PNG.

    title: the caption; note: smaller beside it; alt: what it shows, for those who do not see it (default: the title).
    """

    title: str
    file: str
    svg: str = ""
    base64: str = ""
    kind: str = "picture"
    note: str = ""
    alt: str = ""


class Group(NamedTuple):
    """Tables and pictures side by side where there is room; wide: one under another.

    how: "strips" are pictures of one shape, one under another with their captions at the left, to be compared column by column;
    "panels" are small pictures, several in a row. note: under all of them.
    """

    items: list[Table | Picture]
    wide: bool = False
    how: str = ""
    note: str = ""


class Section(NamedTuple):
    """A heading, lines of text, groups, and text to fold away. The first section has no title: it heads the page, whose name
    stands over its subtitle.

    Under its pictures the first says the results: headlines, each a sentence and what is to be known beside it, and alerts,
    which contradict them.
    """

    title: str
    text: list[str]
    groups: list[Group]
    fold_title: str = ""
    fold: str = ""
    headlines: list[tuple[str, str]] = []
    alerts: list[str] = []
    subtitle: str = ""


def png(title: str, file: str, path: Path, note: str = "", alt: str = "") -> Picture:
    """A picture from a PNG file."""
    return Picture(title, file, base64=base64.b64encode(path.read_bytes()).decode(), note=note, alt=alt)


def html(title: str, sections: list[Section], banner: str = "", refresh_s: int | None = None) -> str:
    """One self-contained page, escaped by jinja. banner: how far an unfinished run is; refresh_s: load it again so often."""
    return _render("report.html.j2", title, sections, banner, refresh_s)


def markdown(title: str, sections: list[Section], banner: str = "") -> str:
    """The same page; pictures are links into `report/`, see `pictures`."""
    return re.sub(r"\n{3,}", "\n\n", _render("report.md.j2", title, sections, banner))


def pictures(sections: list[Section]) -> dict[str, bytes]:
    """Every picture of the sections as a file, by its name."""
    found = (i for s in sections for g in s.groups for i in g.items if isinstance(i, Picture))
    return {p.file: p.svg.encode() or base64.b64decode(p.base64) for p in found}


def _render(template: str, title: str, sections: list[Section], banner: str, refresh_s: int | None = None) -> str:
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["md"], environment.filters["code"] = escape_markdown, code
    text = (resources.files(__name__) / template).read_text("utf-8")
    return environment.from_string(text).render(title=title, sections=sections, banner=banner, refresh_s=refresh_s)


def _cell(text: str) -> str:
    """A cell's text as it is, without what is not printable."""
    return printable(text) if "\n" not in text else one_line(text)


def _shown(value: object) -> object:
    """Whatever a page says, without what is not printable; what is escaped stays so."""
    return type(value)(printable(value)) if isinstance(value, str) else value


def code(text: str) -> Markup:
    """Escaped for HTML, what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def escape_markdown(text: str) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", " ".join(text.split()))


def show(table: Table) -> None:
    """A table that was asked for, on the terminal: drawn by rich, or as aligned plain text where there is none. What a cell
    holds is one line. Raises OSError where stdout has no room."""
    table = table._replace(
        title=one_line(table.title), head=[*map(one_line, table.head)], rows=[[*map(_cell, row)] for row in table.rows]
    )
    console = Console()
    if console.is_terminal:
        drawn = RichTable(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for i, title in enumerate(table.head):
            drawn.add_column(Text(title), justify="left" if i < table.left else "right")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows)]
    print(table.title)
    for row in [table.head, *table.rows]:
        cells = (c.ljust(w) if i < table.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        print("  " + "  ".join(cells).rstrip())
