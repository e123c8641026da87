"""The recipes that come with the package: one complete run a YAML file. Imports nothing heavy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cmt_fast.config.errors import ConfigError, nearest


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = resources.files("cmt_fast") / "recipes"
    return {p.stem: p for p in sorted(Path(str(folder)).glob("*.yaml"))}


def recipe_text(recipe: str) -> str:
    """The YAML of a recipe by name or by path. Raises ConfigError with the nearest name."""
    known = recipes()
    path = known.get(recipe) or Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe: {recipe!r} is neither a file nor one of {', '.join(known)}{nearest(recipe, known)}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe: {recipe!r} cannot be read ({error})") from None
