"""The `cmt` command: parse, build, call. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys

from cmt_fast import __version__, checkpoint, config, distributed, loop
from cmt_fast.cli import about, ckpt, data, estimate, evaluate, features, judge, train, trajectories, tune
from cmt_fast.cli.parser import Parser
from cmt_fast.compiled import CompileError
from cmt_fast.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """All commands, each declared in the module that runs it."""
    root = Parser(prog="cmt", description="Consistency Mid-Training: from a diffusion model to one or two steps.")
    root.add_argument("--version", action="version", version=f"cmt-fast {__version__}")
    root.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; LOCAL_RANK says it too
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    def command(name: str, call, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(call=call)
        return p

    for module in (train, estimate, tune, trajectories, features, judge, evaluate, ckpt, data, about):
        module.add(command)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run a command. 0 done, 1 failed, 2 wrong input, 128 + n stopped by signal n."""
    try:
        args, rest = parser().parse_known_args(arguments)
        if rest:
            if any(r.startswith("-") for r in rest) or not hasattr(args, "overrides"):
                known = [a for p in _subparsers() for a in p._option_string_actions]
                raise ConfigError(f"cmt {args.command}: unknown argument {rest[0]!r}{config.nearest(rest[0], known)}")
            args.overrides += rest
        args.call(args)
        return 0
    except (ConfigError, checkpoint.CheckpointError) as error:
        print(f"cmt: {error}", file=sys.stderr)
        return 2
    except loop.Stopped as stopped:
        print("cmt: stopped; a checkpoint is on disk, the same command goes on from it", file=sys.stderr)
        return int(stopped.code or 1)
    except (CompileError, FloatingPointError, OSError) as error:
        print(f"cmt: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        text = distributed.lost(error)
        if text is None:
            raise
        print(f"cmt: {text}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()


def _subparsers(root: argparse.ArgumentParser | None = None):
    """Every command's parser, and those of its actions."""
    for group in (root or parser())._actions:
        if isinstance(group, argparse._SubParsersAction):
            for inner in group.choices.values():
                yield inner
                yield from _subparsers(inner)
