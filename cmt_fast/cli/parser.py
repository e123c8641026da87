"""The parser of the `cmt` command: argparse whose errors are one line that names the nearest valid word."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from cmt_fast import config
from cmt_fast.config import ConfigError

# command(name, call, text) -> the parser of one more command; call(arguments) runs it
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here."""

    def error(self, message: str):
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = config.nearest(match[1], re.findall(r"[\w-]+", match[2])) if match else ""
        raise ConfigError(f"{self.prog}: {message}{hint}")


def checked(call):
    """What `call` returns; a ValueError in it is a user's error."""
    try:
        return call()
    except ValueError as error:
        raise ConfigError(str(error)) from None
