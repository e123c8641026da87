"""What torchrun makes of our commands: its own parser reads the whole line first, and its ranks all meet the same errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest

from cmt_fast import cli
from cmt_fast.runtime import once


def options() -> list[tuple[str, argparse.Action]]:
    """Every option of every command and of its actions."""
    found = []
    for name in cli.COMMANDS:
        root = cli.parser(name)
        for p in (root, *cli._subparsers(root)):
            found += [(p.prog, action) for action in p._actions if action.option_strings]
    return found


def left_to_us(torchrun: argparse.ArgumentParser, option: str) -> bool:
    """Whether torchrun passes it on to its script."""
    command = ["cmt", "X", option, "8"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return torchrun.parse_args(["--nproc-per-node", "2", "-m", *command]).training_script_args == command[1:]
    return False


def test_every_option_has_a_name_that_torchrun_leaves_to_us():
    """The first one, which the help and the documents give."""
    from torch.distributed.run import get_args_parser

    torchrun = get_args_parser()
    assert not left_to_us(torchrun, "--n")  # which is its --nnodes, or --node-rank
    known = {action.option_strings[0]: f"{prog} {action.option_strings}" for prog, action in options()}
    assert "-n" in known and "--log-every-s" in known  # all commands were asked
    assert [text for option, text in known.items() if not left_to_us(torchrun, option)] == []


def test_an_option_is_written_out(capsys):
    assert cli.main(["sample", "run/post", "--sam", "3"]) == 2
    assert "unknown argument '--sam'" in capsys.readouterr().err


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """Become a rank of a machine, as torchrun starts it; gives its error file."""

    def become(n: int) -> Path:
        file = tmp_path / "attempt_0" / str(n) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        for key, value in {
            "RANK": n,
            "LOCAL_RANK": n,
            "WORLD_SIZE": 2,
            once.FILE: file,
            "TORCHELASTIC_RUN_ID": "x",
        }.items():
            monkeypatch.setenv(key, str(value))
        return file

    monkeypatch.setattr(once, "GRACE_S", 0.1)
    return become


WRONG = ["train", "digits", "pre.btch=3"]


def test_an_error_of_all_ranks_is_told_by_the_first(rank, capsys):
    file = rank(0)
    assert cli.main(["--", *WRONG]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cmt: pre.btch: unknown key") and err.count("\n") == 1
    assert json.loads(file.read_text())["message"]["message"] == err.strip()  # what torchrun's summary shows
    file = rank(1)
    assert cli.main(WRONG) == 0 and capsys.readouterr() == ("", "") and not file.exists()


def test_an_error_of_one_rank_names_it(rank, capsys):
    file = rank(1)
    assert cli.main(WRONG) == 2
    assert capsys.readouterr().err.startswith("cmt: rank 1: pre.btch: unknown key")
    assert "rank 1" in file.read_text()
    rank(0)
    assert cli.main(WRONG) == 0 and capsys.readouterr() == ("", "")


def test_a_fault_of_one_rank_ends_with_its_name(rank, capsys, monkeypatch):
    rank(1)
    monkeypatch.setattr(cli, "_call", lambda arguments: [][1])
    assert cli.main(WRONG) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1] == "cmt: rank 1: IndexError: list index out of range"
