"""`cmt completion`: what a shell needs to complete commands, options, recipes and stages. shtab writes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmt_fast.config import recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES

SHELLS = ("bash", "zsh", "fish", "tcsh")
HOW = {
    "bash": "cmt completion bash > ~/.cmt.bash; echo '. ~/.cmt.bash' >> ~/.bashrc",
    "zsh": "mkdir -p ~/.zfunc; cmt completion zsh > ~/.zfunc/_cmt; "
    "echo 'fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit' >> ~/.zshrc",
    "fish": "mkdir -p ~/.config/fish/completions; cmt completion fish > ~/.config/fish/completions/cmt.fish",
    "tcsh": "cmt completion tcsh > ~/.cmt.tcsh; echo 'source ~/.cmt.tcsh' >> ~/.tcshrc",
}
# a shell's words for a recipe: one that comes with the package, a YAML file, a folder on the way to one; tcsh knows the first
RECIPE = {
    "bash": """_cmt_recipe() {
  compgen -W "%s" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -S / -- "$1"
}""",
    "zsh": """_cmt_recipe() {
  compadd -- %s
  _files -g '*.yaml'
}""",
    "fish": """function _cmt_recipe
  printf '%%s\\n' %s
  __fish_complete_suffix .yaml
end""",
}
WORDS = {"bash": "_cmt_recipe", "zsh": "_cmt_recipe", "fish": "(_cmt_recipe)"}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=completion)
    p.add_argument("shell", choices=SHELLS, help="whose script is printed")
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = "It needs the extra `completion`. Where the script goes:\n  " + "\n  ".join(HOW.values())


def completion(args: argparse.Namespace) -> None:
    """Print the script. Raises ConfigError without shtab."""
    try:
        import shtab
    except ImportError:
        raise ConfigError(
            "cmt completion: shtab, which writes it, is missing; pip install 'cmt-fast[completion]'"
        ) from None
    from cmt_fast.cli import complete_parser

    root = complete_parser()
    for p in _all(root):
        for action in p._actions:
            _meant(action, shtab, args.shell)
    names = " ".join(recipes.recipes())
    preamble = {args.shell: RECIPE[args.shell] % names} if args.shell in RECIPE else ""
    print(shtab.complete(root, args.shell, preamble=preamble))


def _meant(action: argparse.Action, shtab, shell: str) -> None:
    """What stands in the place of an argument: one of the recipes, a stage, a folder or a file."""
    if action.choices is not None or action.nargs == 0:
        return
    if action.dest == "recipe" and shell in WORDS:
        action.complete = {shell: WORDS[shell]}  # type: ignore[attr-defined]  # or a file of one's own
    elif action.dest == "recipe":
        action.choices = list(recipes.recipes())
    elif action.dest == "stages":
        action.choices = list(STAGES)
    elif action.metavar in ("RUN", "RUN/STAGE", "FOLDER", "STORE") or action.dest == "out":
        action.complete = shtab.FILE  # type: ignore[attr-defined]  # a folder or what is in it
    elif action.type is Path:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _all(root: argparse.ArgumentParser):
    yield root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _all(inner)
