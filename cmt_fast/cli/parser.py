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
        """Raises ConfigError. What is missing or none of those that are valid is told with these, in our words."""
        where = "" if self.prog == self.prog.split()[0] else f"{self.prog}: "
        if lacking := re.fullmatch(r"the following arguments are required: (.*)", message):
            said = (self._missing(name) for name in lacking[1].split(", "))
            raise ConfigError(f"{where}{'; '.join(text for text in said if text)}")
        message = message.removeprefix("argument ")
        if wrong := re.fullmatch(r"([^ ]+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            valid = re.findall(r"[\w.+-]+", wrong[3])
            message = f"{wrong[1]}: {wrong[2]!r} is not valid; valid are {', '.join(valid)}{nearest(wrong[2], valid)}"
        raise ConfigError(f"{where}{message}")

    def _missing(self, name: str) -> str:
        """What is to be said of an argument that is not there: what it takes. Nothing of one that may be left out."""
        action = next((a for a in self._actions if name in (a.metavar, a.dest, "/".join(a.option_strings))), None)
        if action is None:
            return f"{name} is missing"
        if action.nargs == argparse.ZERO_OR_MORE:  # argparse counts it among the required
            return ""
        if action.choices is not None:
            more = f"; `{self.prog} --help` says what each does" * isinstance(action, argparse._SubParsersAction)
            return f"{name} is missing; valid are {', '.join(map(str, action.choices))}{more}"
        return f"{name} is missing: {action.help}" if action.help else f"{name} is missing"


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
