"""Every command block of the documents is run in its CPU form; every command in them parses; addresses are public."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import sys
from urllib.parse import urlsplit

import pytest

from cmt_fast import cli
from cmt_fast.config import loading, recipes
from tests.fixtures.commands import DOCUMENTS, ROOT, blocks, cmt, commands, verbs

BLOCKS = [b for document in DOCUMENTS for b in blocks(document)]
ids = lambda b: f"{b.document}:{b.line}"

PUBLIC = {
    "arxiv.org", "github.com", "download.pytorch.org", "nvlabs-fi-cdn.nvidia.com", "dl.fbaipublicfiles.com",
    "openaipublic.blob.core.windows.net", "huggingface.co", "www.image-net.org", "docs.nvidia.com", "catalog.ngc.nvidia.com",
    "docs.docker.com", "git-lfs.github.com", "yaml.org", "www.apache.org", "pypi.org",
}  # fmt: skip
REGISTRIES = {"nvcr.io/nvidia/pytorch", "python"}


def test_no_document_is_left_out():
    tracked = [p for pattern in ("*.md", "docker/**/*.md", "csrc/*.md", "docs/**/*.md") for p in ROOT.glob(pattern)]
    assert {str(p.relative_to(ROOT)) for p in tracked if "```bash" in p.read_text("utf-8")} == set(DOCUMENTS)


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_says_how_it_is_run(block):
    assert block.kind, "a comment before the block must say how it is run on a CPU; see tests/fixtures/commands.py"
    if block.kind == "cpu":
        assert verbs(block.lines) == verbs(commands(block.body)), (
            "the CPU form must be the same commands in the same order"
        )
    if block.kind == "cpu form":
        named = [b for b in BLOCKS if b.document == block.document and (b.kind, b.text) == ("run", block.text)]
        assert len(named) == 1, f"no block says `run: {block.text}`"
        missing = [v for v in verbs(commands(block.body)) if v not in verbs(named[0].lines)]
        assert not missing, f"its CPU form does not run {missing}"
    if block.kind == "not run":
        assert len(block.text) > 15, "why it is not run"


LINES = [(b, line) for b in BLOCKS for line in dict.fromkeys([*commands(b.body), *b.lines])]


@pytest.mark.parametrize("block, line", LINES, ids=lambda v: ids(v) if hasattr(v, "line") else v[:60])
def test_commands_parse(block, line):
    if block.kind in ("run", "cpu"):
        assert line.split()[0] in ("cmt", "python"), "other programs are not run by a test"
    arguments = cmt(line)
    if arguments is None:
        return
    args, rest = cli.parser(arguments[0]).parse_known_args(arguments)
    overrides = [*getattr(args, "overrides", []), *rest]
    assert not [r for r in overrides if "=" not in r]
    recipe = getattr(args, "recipe", None)
    made = [words[3] for words in map(str.split, block.lines) if words[:3] == ["cmt", "recipes", "new"]]
    if recipe and recipe.removesuffix(".yaml") in made:  # the block writes it, and is run
        return
    if recipe and not recipe.startswith("runs/"):  # that is a run, of which a command takes either
        loading.load(recipe if recipe in recipes.recipes() else str(ROOT / recipe), overrides)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_cpu_forms_run(document, tmp_path, monkeypatch, capsys):
    """In one process, which imports torch once; `cmt` and `python -m` do the same work in processes of their own."""
    mine = [b for b in BLOCKS if b.document == document and b.kind in ("run", "cpu")]
    assert mine
    if any("vae" in line for b in mine for line in b.lines) and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    os.symlink(ROOT / "docker", tmp_path / "docker")
    monkeypatch.chdir(tmp_path)
    for block in mine:
        for line in block.lines:
            words = shlex.split(line)
            if words[:2] == ["python", "-m"]:
                monkeypatch.setattr(sys, "argv", words[2:])
                runpy.run_module(words[2], run_name="__main__")
            else:
                code = cli.main(words[1:])
                assert code == 0, f"{ids(block)}: {line}\n{capsys.readouterr().err}"


def _texts():
    for pattern in (
        "*.md",
        "docker/*",
        "docker/**/*",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        ".ci/run",
        "cmt_fast/**/*",
    ):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix in (".md", ".py", ".yaml", ".toml", ".txt", ".j2", ".sbatch", ".sh", ""):
                yield path, path.read_text("utf-8")


def addresses(text: str) -> list[str]:
    """Hosts of all http addresses in a text."""
    return [urlsplit(u).hostname or "" for u in re.findall(r"https?://[^\s\"'`<>)\]}]+", text)]


def test_addresses_are_public():
    found = {(host, str(path.relative_to(ROOT))) for path, text in _texts() for host in addresses(text)}
    assert {"arxiv.org", "download.pytorch.org"} <= {host for host, _ in found}
    assert not sorted(f for f in found if f[0] not in PUBLIC | {"www.w3.org"})
    assert not [path for path, text in _texts() if re.search(r"http://(?!www\.w3\.org/)", text)], "https alone"


def test_an_address_inside_a_company_would_be_found():
    text = "pip install --index-url https://artifactory.corp.example.com/simple x; see https://github.com/a/b."
    assert addresses(text) == ["artifactory.corp.example.com", "github.com"]


def test_images_come_from_public_registries():
    bases = re.findall(r"^ARG \w+_BASE=([^:@\s]+)", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)
    assert len(bases) == 2 and set(bases) <= REGISTRIES
