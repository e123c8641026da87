"""`cmt data look`, and the picture of a dry run: the samples that training is about to see."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cmt_fast.cli.parser import checked
from cmt_fast.config.errors import ConfigError

if TYPE_CHECKING:
    from cmt_fast.config.schema import Data
    from cmt_fast.data.rows import Rows
    from cmt_fast.run.workspace import Workspace


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=look)
    p.add_argument(
        "data", metavar="STORE", help="a store, an .npz file, or a recipe, whose data are shown as it sets them"
    )
    p.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: NAME-look.png here)")
    p.add_argument("--seed", type=int, default=0, help="of the order of rows (default: 0)")
    p.add_argument("-n", "--samples", "--n", dest="n", type=int, default=16, help="samples (default: 16)")
    p.add_argument("--vae", metavar="FOLDER_OR_ID", help="the autoencoder (default: the one that the store names)")
    p.add_argument("--device", default="auto", help="where latents are decoded")


def look(args: argparse.Namespace) -> None:
    from cmt_fast.render import look as picture
    from cmt_fast.run import look as looking
    from cmt_fast.run.decoding import Decoding
    from cmt_fast.runtime import machine

    if args.n < 1 or args.seed < 0:
        raise ConfigError(f"--{'n' if args.n < 1 else 'seed'}: must be at least {1 if args.n < 1 else 0}")
    config, vae = _config(args.data)
    out = args.out or Path(f"{Path(args.data).resolve().stem}-look.png")
    _check(out)
    device = machine.device(args.device)
    data, refused = checked(lambda: _opened(config))
    decoding = Decoding(data, device, args.vae or vae)
    found = checked(lambda: looking.gather(data, decoding, args.seed, args.data, args.n))
    if args.vae and decoding.why:
        raise ConfigError(decoding.why)
    picture.draw(found._replace(lines=[*found.lines, *refused]), out)
    print("\n".join([*found.lines, *refused]))
    print(f"{out}: a picture of them")


def of_run(work: Workspace, out: Path) -> None:
    """The picture of a run's data, as its recipe sets them; a line where it cannot be written."""
    from cmt_fast.render import look as picture
    from cmt_fast.run import look as looking

    found = checked(lambda: looking.gather(work.data, work.decoding, work.run.seed, work.run.name))
    try:
        picture.draw(found, out)
    except OSError as error:
        return print(f"no picture of the data: {error.strerror or error}: {out}")
    print(f"{out}: a picture of the first samples ({'; '.join(found.lines[2:])})")


def _opened(config: Data) -> tuple[Rows, list[str]]:
    """The data, also where training would refuse their numbers, which is what one looks for; a line then says so."""
    from cmt_fast.data import datasets

    try:
        return datasets.load(config), []
    except ValueError as error:
        if getattr(config, "unchecked", True):
            raise
        return datasets.load(dataclasses.replace(config, unchecked=True)), [f"training refuses these: {error}"]


def _config(text: str) -> tuple[Data, str | None]:
    """What a store, a file or a recipe says of its data, and the autoencoder that the recipe names."""
    from cmt_fast.config import loading, recipes
    from cmt_fast.config.schema import Latents, Npz

    path = Path(text)
    if text in recipes.recipes() or path.suffix in (".yaml", ".yml"):
        run = loading.load(text)
        return run.data, run.eval.vae
    if path.suffix == ".npz":
        return Npz(text), None
    if not path.is_dir():
        raise ConfigError(f"STORE: {text!r} is no store, no .npz file and no recipe")
    return Latents(text), None


def _check(out: Path) -> None:
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"--out: {str(out)!r} is not valid; it names a .png file in a folder that exists")
