"""The pages: targets, files, links and tests that they name exist; their tables are what the command writes.

Their commands are run by test_commands.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from bench.harness import gpu_tables, tables
from bench.harness.pages import inputs, keys, promises, safety
from cmt_fast.config import describe, recipes

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
PAGES = sorted(p for pattern in ("*.md", "docs/*.md", "bench/*.md", "docker/*.md") for p in ROOT.glob(pattern))
GRID = ROOT / "docs" / "grid.md"
PLANS = ("plan", "plan-levers", "plan-activations", "plan-sources")
MARK = re.compile(r"<!-- table: ([\w-]+) -->")
ids = lambda p: str(p.relative_to(ROOT)) if isinstance(p, Path) else str(p)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The command works on the pages of the folder where it is called."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("target", [x.split()[1] for x in LINES if x.startswith("make ")])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


def test_the_file_tree_names_files_that_are_there():
    tree = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        first = line.split("  ")[0] if not line.startswith("  ") else ""
        folder = first.split()[0] if first else folder
        for name in re.findall(r"[\w/]+\.py\b", line):
            name, root = name.lstrip("/"), ROOT / folder
            assert (root / name).exists() or list(root.rglob(name)), f"{name} is not under {folder}"


def test_the_ideas_name_files_that_are_there():
    text = (ROOT / "docs" / "ideas.md").read_text("utf-8")
    named = re.findall(r"`(\w+/[\w./]+\.(?:py|cpp|cu|h))`", text)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_tables_are_generated_not_typed():
    marks = [mark for page in PAGES for mark in MARK.findall(page.read_text("utf-8"))]
    assert len(marks) == len(set(marks))
    for mark in marks:
        kind, _, recipe = mark.partition("-")
        if kind in gpu_tables.CARDS:  # what no card has measured yet says so in place of a table
            assert recipe in gpu_tables.TABLES, mark
            continue
        if kind in ("gallery", "search", "seeds") and "Not measured yet" in tables.filled(
            f"<!-- table: {mark} -->\n<!-- end -->"
        ):
            assert recipe in recipes.recipes(), mark
            continue
        if mark in (
            "inputs",
            "keys",
            "licences",
            "promises",
            "ranks",
            "published",
            "recipes",
            "safety",
            "safety-readme",
            "sources",
            "speedrun-digits",  # of records/, which tests/speedrun looks at
            "speedrun-digits-short",
            "speedrun-photos",
        ):  # of the sources, not of a measurement
            continue
        if kind == "grid":  # hours of it: a suite that nobody has measured says so
            suite = recipe.partition("-")[0]
            there = (ROOT / "bench" / "results" / "cpu" / f"grid-{suite}.json").is_file()
            assert there or f"Not measured yet: `python -m bench grid {suite}`" in GRID.read_text("utf-8"), mark
            continue
        name = {
            "predicted": "predicted/ops", "launches": "predicted/launches", "launches-edm2": "predicted/launches-edm2",
            "predicted-steps": "predicted/steps", "native": "cpu/ops",
            "stages-digits": "cpu/digits-seeds", "sizing": "cpu/ranks", "worth": "cpu/gmm-worth",
            **dict.fromkeys(PLANS, "predicted/plans"),
        }.get(mark, "cpu/" + (f"{recipe}-{kind}" if recipe else kind))  # fmt: skip
        assert (ROOT / "bench" / "results" / f"{name}.json").is_file(), mark


def test_every_page_with_a_table_is_written_by_the_command():
    marked = {p.relative_to(ROOT) for p in PAGES if MARK.search(p.read_text("utf-8"))}
    assert marked == set(tables.PAGES)


@pytest.mark.parametrize("page", tables.PAGES, ids=str)
def test_pages_hold_what_the_command_writes(page):
    text = page.read_text("utf-8")
    assert tables.filled(text) == text, "run `python -m bench report`"


def test_keys_and_texts_are_the_same_set(tmp_path, monkeypatch):
    """A key without a sentence is an error, and a sentence without a key."""
    texts = yaml.safe_load(describe.TEXTS.read_text("utf-8"))
    monkeypatch.setattr(describe, "TEXTS", tmp_path / "keys.yaml")
    lacking = {**texts, "Stage": {k: v for k, v in texts["Stage"].items() if k != "lr"}}
    spare = {**texts, "Run": {**texts["Run"], "x": "y"}}
    counted = {**texts, "units": {**texts["units"], "apples": ["Stage.lrr"]}}
    for changed, words in ((lacking, "Stage.lr has no text"), (spare, "Run.x"), (counted, "Stage.lrr")):
        describe.TEXTS.write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=words):
            keys.table()


def test_a_promise_without_its_test_is_an_error():
    found = promises.functions()
    assert "(../tests/test_readme.py)" in promises.link("test_make_targets_exist", found)
    with pytest.raises(ValueError, match="in 0 test files"):
        promises.link("test_that_nobody_wrote", found)


def test_a_row_of_inputs_without_its_test_or_its_report_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "FOLDER", tmp_path)
    row = {"given": "x", "now": "y", "test": "test_make_targets_exist", "report": "owner/name#1"}
    for wrong, words in (
        ({"test": "test_that_nobody_wrote"}, "in 0 test files"),
        ({"report": "a thread"}, "no owner"),
        ({"why": "z"}, "needs given"),
        ({}, ""),
    ):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"title": "A", "rows": [row | wrong]}))
        if words:
            with pytest.raises(ValueError, match=words):
                inputs.table()
        else:
            assert "(https://github.com/owner/name/issues/1)" in inputs.table()


SAFE = {"promise": "x", "test": "test_make_targets_exist", "figure": "{lost} of {by.rank.1:,}", "result": "cpu/a.json"}


@pytest.fixture
def safety_row(tmp_path, monkeypatch):
    """A page of one row, and its result."""
    monkeypatch.setattr(safety, "FOLDER", tmp_path)
    monkeypatch.setattr(safety, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.json").write_text(
        '{"lost": 0, "by": {"rank": [50, 1000]}, "commit": "abc", "date": "2026-11-28T1"}'
    )

    def write(rows, which=""):
        (tmp_path / "signals.yaml").write_text(yaml.safe_dump(rows))
        return safety.table(which)

    return write


def test_a_figure_of_safety_is_filled_from_its_result(safety_row):
    page = safety_row([SAFE])
    assert "## Kills, signals and schedulers" in page and "commit abc, 2026-11-28." in page
    assert "| x | 0 of 1,000 | [test_make_targets_exist](../tests/test_readme.py) |" in page
    typed = {k: v for k, v in SAFE.items() if k != "result"} | {"figure": "5 kinds"}
    assert "| x | in a test: 5 kinds |" in safety_row([typed])
    assert "not measured yet (cpu/b.json)" in safety_row([SAFE | {"result": "cpu/b.json"}])


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"test": "test_that_nobody_wrote"}, "in 0 test files"),
        ({"test": " "}, "names no test"),
        ({"figure": "{won}"}, "no 'won' among by, commit, date, lost"),
        ({"figure": "{by.rank.2}"}, "cannot be filled"),
        ({"figure": "{by.rank}"}, "is no figure"),
        ({"figure": "0 of 100"}, "figures are not typed"),
        ({"why": "z"}, "needs promise"),
    ],
)
def test_a_row_of_safety_that_is_not_held_is_an_error(safety_row, wrong, words):
    with pytest.raises(ValueError, match=words):
        safety_row([SAFE | wrong])


def test_the_readme_shows_the_rows_that_are_chosen(safety_row):
    chosen = SAFE | {"readme": True}
    page = safety_row([SAFE | {"promise": "y"}, chosen], "readme")
    assert "| y |" not in page and "| x | 0 of 1,000 | [test_make_targets_exist](tests/test_readme.py) |" in page
    with pytest.raises(ValueError, match="in 6 rows"):
        safety_row([chosen] * 6, "readme")


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings as GitHub spells them, and its own anchors."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles} | set(
        re.findall(r'<a id="(.*?)"', text)
    )


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_go_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_pictures_are_small():
    files = [p for p in (ROOT / "docs").rglob("*") if p.suffix in (".png", ".svg")]
    assert files and not [ids(p) for p in files if p.stat().st_size > 150 * 1024]
