"""The parser of the `cmt` command: argparse whose errors are one line that names the nearest valid word."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cmt_fast.config.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here.

    Options are written out: what an abbreviation means changes with every option that comes to be, and torchrun takes some
    for its own.
    """

    def __init__(self, **about: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **about})

    def error(self, message: str):
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = nearest(match[1], re.findall(r"[\w-]+", match[2])) if match else ""
        raise ConfigError(f"{self.prog}: {message}{hint}")


def add_overrides(p: argparse.ArgumentParser) -> None:
    """Declare the recipe's keys that a command line may set."""
    text = "any key of the recipe, as pre.images_nimg=6400; `cmt keys` has all"
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=text)


def checked(call):
    """What `call` returns; a ValueError in it is a user's error."""
    try:
        return call()
    except ValueError as error:
        raise ConfigError(str(error)) from None
