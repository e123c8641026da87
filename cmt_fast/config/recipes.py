"""The recipes that come with the package: one complete run a YAML file. Imports nothing heavy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cmt_fast.config.errors import ConfigError, nearest


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = resources.files("cmt_fast") / "recipes"
    return {p.stem: p for p in sorted(Path(str(folder)).glob("*.yaml"))}


def listed() -> list[str]:
    """The recipes that come with the package, each with the first line of its header."""
    known = recipes()
    width = max(map(len, known))
    return [f"{name:{width}s} {path.read_text('utf-8').splitlines()[0].lstrip('# ')}" for name, path in known.items()]


def recipe_text(recipe: str) -> str:
    """The YAML of a recipe by name or by path, without the mark that some editors begin a file with. Raises ConfigError with
    the nearest name, or with what a run's folder or an override in its place was meant as.
    """
    known = recipes()
    path = known.get(recipe) or Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe: {recipe!r} is {_instead(recipe, list(known))}")
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "; it must be UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError(f"recipe: {recipe!r} cannot be read ({error}){hint}") from None


def _instead(recipe: str, known: list[str]) -> str:
    """What a word is that names no recipe, and what it may have been meant as."""
    for run in (Path(recipe), Path(recipe).parent):
        if (run / "run.json").is_file():
            return f"of a run; `cmt train --resume {run}` goes on with it as it was begun"
    if "=" in recipe and "/" not in recipe.partition("=")[0]:
        return f"an override, and a recipe comes before it, as in `cmt train digits {recipe}`"
    if Path(f"{recipe}.yaml").is_file():
        return f"no recipe of the package; did you mean {recipe}.yaml?"
    return f"neither a file nor one of {', '.join(known)}{nearest(recipe, known)}"
