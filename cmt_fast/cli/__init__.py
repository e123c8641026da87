"""The `cmt` command: parse, resolve, call. What a user got wrong is one line on stderr and exit code 2 (runtime/exits.py).

A command is a module with `add_arguments(parser)`, which names what to call. Only the module of the command that is asked
for is imported: `cmt --help` needs neither torch nor the schema.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmt_fast import __version__
from cmt_fast.cli.parser import Parser
from cmt_fast.config.errors import ConfigError, nearest, one_line, printable
from cmt_fast.config.secrets import hidden
from cmt_fast.runtime import exits, once, signals, streams
from cmt_fast.runtime.signals import Stopped

STDOUT = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
ALL = "*"
# arguments that name what is written
WRITTEN = ("out", "json", "make_reference", "record", "grid", "interpolate", "strip")
# command: its module, what it is for
COMMANDS = {
    "train": ("train", "train the stages of a recipe; rerun to resume"),
    "search": ("search", "train one stage over a grid of settings and record the figures"),
    "speedrun": (
        "speedrun",
        "train from nothing to a track's distance at one step and write the attempt; verify a record, print the table",
    ),
    "estimate": ("estimate", "what a recipe will cost: memory, FLOPs, hours, energy; what each idea saves"),
    "plan": ("plan", "what of a recipe fits a budget of hours or money on given cards, as a command line"),
    "tune-teacher": (
        "tune_teacher",
        "measure the teacher's solver by step doubling and propose the cheapest order, grid and number of calls",
    ),
    "trajectories": (
        "trajectories",
        "write a teacher's trajectories to a store, which a stage's trajectories.cache names; rerun to resume",
    ),
    "train-features": (
        "train_features",
        "train the classifier behind the distance latent_lpips on a recipe's data; rerun to resume",
    ),
    "sample": ("sample", "samples of a trained stage as PNGs, as .npz and in pictures; rerun to resume"),
    "watch": ("watch", "how far a run is while it trains: stages, speed, figures, time left; also as a page (--serve)"),
    "replay": (
        "replay",
        "take one step of a stage once more: its hashes beside those recorded, its layers beside plain torch",
    ),
    "report": ("report", "write RUN/report.html and RUN/report.md"),
    "objectives": (
        "objectives",
        "the objectives: paper, equation, counted work, recipes; --check: at rest where the answer is known",
    ),
    "theory": ("theory", "measure solver orders and gradient bias on a Gaussian mixture, against the paper's slopes"),
    "eval": ("eval", "Fréchet distance (FID, FD-DINOv2), accuracy, precision and recall of a trained stage"),
    "runs": ("runs", "list, show, compare and prune runs"),
    "ckpt": ("ckpt", "list, verify, import and export checkpoints; reconstruct an EMA profile"),
    "data": ("data", "stores of latents or images: encode, import foreign files, look, verify, stats"),
    "recipes": ("recipes", "list, show, copy or validate recipes, or write a new one for a store"),
    "keys": ("keys", "every key of a recipe: type, default, unit, meaning, which recipes set it"),
    "completion": ("completion", "a script by which bash, zsh, fish or tcsh completes commands, options and recipes"),
    "doctor": ("doctor", "show this machine's versions, devices and ops, or check that a run is alive"),
}


def parser(asked: str | None = None) -> argparse.ArgumentParser:
    """All commands by name; with its arguments only the one that is asked for."""
    text = "Consistency Mid-Training: from a diffusion model to one or two steps."
    begin = "To begin: cmt recipes ls; cmt train digits; cmt watch runs/digits. cmt COMMAND --help says what a command takes."
    root = Parser(prog="cmt", description=text, epilog=begin)
    root.add_argument("--version", action="version", version=f"cmt-fast {__version__}")
    root.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; LOCAL_RANK says it too
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        p = commands.add_parser(name, help=text, description=text)
        if name == asked or asked is ALL:
            importlib.import_module(f"cmt_fast.cli.{module}").add_arguments(p)
    return root


def complete_parser() -> argparse.ArgumentParser:
    """All commands with all their arguments: imports all that any of them does."""
    return parser(ALL)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code, one of `exits`. Of several ranks one tells what failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    streams.ready()
    with signals.heard():
        try:
            return _main(arguments)
        except KeyboardInterrupt as error:  # as the process group was left
            return _interrupted(signals.code_of(error))


def _main(arguments: list[str]) -> int:
    try:
        with once.voice():
            _call(_own(arguments))
        return exits.DONE
    except Stopped as stopped:
        if once.rank() == 0:
            print(f"cmt: stopped; {stopped.left}, rerun the same command to resume", file=sys.stderr)
        return int(stopped.code or exits.FAILED)
    except KeyboardInterrupt as error:
        return _interrupted(signals.code_of(error))
    except BrokenPipeError as error:
        return exits.SIGNAL + signal.SIGPIPE if _nobody_reads() else _told(error) or exits.FAILED
    except Exception as error:
        if number := signals.unanswered():  # of a library that made an error of its own of the interrupt
            return _interrupted(exits.SIGNAL + number)
        code = _told(error)
        if code is None:
            sys.excepthook = _traceback
            raise
        return code
    finally:
        if "torch" in sys.modules:
            from cmt_fast.runtime import distributed

            distributed.stop()


def _interrupted(code: int) -> int:
    """Say that a signal ended the command; its exit code."""
    if once.rank() == 0:
        print(f"cmt: {signals.words(code - exits.SIGNAL)}", file=sys.stderr, flush=True)
    return code


def _own(arguments: list[str]) -> list[str]:
    """The arguments without a `--` that torchrun was told to end its own by, and passed on."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return [
        a for i, a in enumerate(arguments) if not (a == "--" and "--" not in arguments[:i] and (launched or i == 0))
    ]


def _may_be_written(args: argparse.Namespace) -> None:
    """Raises ConfigError where what is written, by rename, would take the place of a pipe, a device or /dev/stdout."""
    for name in WRITTEN:
        if isinstance(path := getattr(args, name, None), Path):
            from cmt_fast.storage import files

            if files.no_place(path):
                what = f"{path} is there and is no file and no folder; choose another name"
                raise ConfigError(f"--{name.replace('_', '-')}: {what}")


def _call(arguments: list[str]) -> None:
    """Parse and call."""
    with signals.starting():
        root = parser(next((a for a in arguments if a in COMMANDS), None))
    args, rest = root.parse_known_args(arguments)
    if rest:
        if any(r.startswith("-") for r in rest) or not hasattr(args, "overrides"):
            raise ConfigError(_unknown(root, args, rest[0], arguments))
        args.overrides += rest
    _may_be_written(args)
    args.call(args)
    sys.stdout.flush()


def _unknown(root: argparse.ArgumentParser, args: argparse.Namespace, given: str, arguments: list[str]) -> str:
    """The line of an argument that no command takes: a recipe's key that was meant, else the nearest option."""
    from cmt_fast.config.synonyms import command_line

    known = [a for p in _subparsers(root) for a in p._option_string_actions]
    word, hint = given.partition("=")[0], ""
    if hasattr(args, "overrides"):
        after = arguments[arguments.index(given) + 1 :] if given in arguments else []
        near = nearest(word, known)
        hint = command_line(given, after[0] if after and after[0][:1] != "-" else "")
        hint = near if near and not hint else hint
    if not hint and word in known:
        hint = f"; it is of other actions of `cmt {args.command}`, `--help` after an action lists what that takes"
    hint = hint or nearest(word, known) or f"; `cmt {args.command} --help` lists what it takes"
    return f"cmt {args.command}: unknown argument {given!r}{hint}"


def _nobody_reads() -> bool:
    """Whether who read our output is gone, as `head` is; what is left of it then goes nowhere, without a word."""
    output = select.poll()
    output.register(STDOUT, 0)  # asks for errors alone
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return gone


def _told(error: Exception) -> int | None:
    """The exit code of an error that is told in one line; None for one that is a fault of ours.

    A rank whose error another one tells ends without a word, and with 0: torchrun lists only those that failed otherwise.
    """
    if isinstance(error, ConfigError):
        text, code = str(error), exits.WRONG_INPUT
    elif memory := _of_memory(error):
        text, code = memory, exits.OUT_OF_MEMORY
    elif isinstance(error, OSError):
        text, code = _of_system(error), exits.DISK_FULL if error.errno in FULL else exits.FAILED
    elif isinstance(error, FloatingPointError):
        text, code = str(error), getattr(error, "code", exits.NOT_FINITE)
    else:
        text, code = _of_torch(error)
    if not once.tell():
        return exits.DONE
    if text is not None:
        text = printable(hidden(text))
        print(f"cmt: {once.named(text)}", file=sys.stderr, flush=True)
        once.leave(f"cmt: {once.named(text)}")
        return code
    last = one_line(hidden(f"{type(error).__name__}: {error}"))
    once.leave(f"cmt: {once.named(last)} (its traceback is above)")
    if once.rank() == 0:
        return None
    _traceback(type(error), error, error.__traceback__)
    print(f"cmt: {once.named(last)}", file=sys.stderr, flush=True)
    return exits.FAILED


def _traceback(kind: Any, error: Any, trace: Any) -> None:
    """As Python shows it, without keys and passwords."""
    print(hidden("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _of_memory(error: Exception) -> str | None:
    """The line of an error that means that memory has ended, with what would fit where that is known; None for others."""
    if "torch" not in sys.modules:
        return "out of memory on the host" if isinstance(error, MemoryError) else None
    from cmt_fast.runtime import memory

    if isinstance(error, memory.OutOfMemory):
        return str(error)
    why = memory.ran_out(error)
    return f"out of memory: {why}; a smaller eval.batch, and fewer -n, hold less at once" if why else None


def _of_system(error: OSError) -> str:
    """What the system refused, after the whole path of the file: who reads a log does not know the folder of the process."""
    if not error.strerror or isinstance(error.filename, int):
        return str(error)
    place = error.filename2 or error.filename
    return f"{os.path.abspath(os.fsdecode(place))}: {error.strerror}" if place else error.strerror


def _of_torch(error: Exception) -> tuple[str | None, int]:
    """The line and exit code of an error of a module that imports torch."""
    from cmt_fast.engine.compile import CompileError
    from cmt_fast.runtime import distributed
    from cmt_fast.storage.checkpoint import CheckpointError
    from cmt_fast.train.looking import Failed

    if isinstance(error, CheckpointError):
        return str(error), exits.WRONG_INPUT
    if isinstance(error, CompileError | Failed):
        return str(error), exits.FAILED
    lost = distributed.lost(error) if isinstance(error, RuntimeError) else None
    return lost, exits.FAILED if lost is None else exits.PEER_LOST


def _subparsers(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command's parser, and those of its actions."""
    for group in root._actions:
        if isinstance(group, argparse._SubParsersAction):
            for inner in group.choices.values():
                yield inner
                yield from _subparsers(inner)
