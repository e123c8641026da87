"""A folder of images as people have it: which files are images, which folders are classes, and what is left out.

Links are followed, so a data set may be put together from links to files and folders. Whatever is no image is counted and
named, and folders that may not be what they look like (splits, one level too many, none of whose files is an image) are
asked about rather than made classes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from cmt_fast.data.archives import DatasetError, labels_in

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# what systems and tools leave behind, beside everything whose name begins with a dot
DEBRIS = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle", "system volume information", "__pycache__")
SPLIT = re.compile(
    r"((\w*\d\w*|img|imgs|image|images)[_-])?(train|training|trn|val|valid|validation|dev|test|testing|eval|holdout|unlabell?ed)"
    r"([_-]?(set|img|imgs|image|images|data|\d+))?",
    re.IGNORECASE,
)
ANY = "--any-class takes every folder as a class"
NOWHERE = (errno.ENOENT, errno.ELOOP)  # what a link that leads nowhere, or to itself, ends in


class Picture(NamedTuple):
    """A file of the folder: name below it, bytes (-1: a link that leads nowhere), class."""

    name: str
    size: int
    label: int | None


class Listing(NamedTuple):
    """The images of `source`, sorted by class folder and name; classes: names of the class folders, [] without any.

    skipped: files that are not read as images; left_out: folders that are not looked into; dead: links that lead nowhere
    and do not have an image's name.
    """

    source: Path
    pictures: list[Picture]
    classes: list[str]
    skipped: list[str]
    left_out: list[str]
    dead: list[str]

    def told(self) -> str:
        """One line on what was passed over, "" where nothing was."""
        kinds = (
            (self.skipped, "file that is not read as an image", "files that are not read as images"),
            (self.left_out, "folder", "folders"),
            (self.dead, "link that leads nowhere", "links that lead nowhere"),
        )
        return "; ".join(f"skipped {len(found):,} {one if len(found) == 1 else many}: {named(found)}"
                         for found, one, many in kinds if found)  # fmt: skip


def named(names: list[str], most: int = 3) -> str:
    """The first few of some names."""
    shown = ", ".join(text(n) for n in names[:most])
    return shown + (", ..." if len(names) > most else "")


def text(name: str) -> str:
    """A file's name as proper Unicode."""
    return os.fsencode(name).decode("utf-8", "replace")


def debris(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind by a system or a tool."""
    return name.startswith(".") or name.lower() in DEBRIS


def listing(source: Path, any_class: bool = False) -> Listing:
    """What is in `source`: images in class folders (at any depth below them) or beside each other.

    any_class: every folder is a class, also one named like a split and one without an image. Raises DatasetError when there
    is no image, when images lie both in class folders and beside them, for a circle of links, and unless `any_class` for
    folders that look like something else than classes.
    """
    if not source.is_dir():
        raise DatasetError(f"{source}: is not a folder")
    if not any_class and labels_in(source / "dataset.json"):
        raise DatasetError(
            f"{source}: has a dataset.json with labels, so its folders are no classes; `cmt data import {source} OUT "
            f"--format edm` reads it; {ANY}"
        )
    walk = _Walk(source)
    above = {_identity(p.stat()) for p in source.resolve().parents}
    loose, folders = walk.entries(source, None, above | {_identity(source.stat())})
    classed = []
    for k, (folder, inside) in enumerate(folders):
        classed.append((folder.name, walk.below(folder, k, inside)))
    found = [p for _, pictures in classed for p in pictures]
    if found and loose:
        raise DatasetError(
            f"{source}: has images in folders ({named([n for n, p in classed if p])}) and beside them "
            f"({named([p.name for p in loose])}); put all into class folders, or none"
        )
    if not found and not loose:
        other = f"; it has {len(walk.skipped):,} other files ({named(walk.skipped)})" if walk.skipped else ""
        raise DatasetError(f"{source}: holds no image ({', '.join(SUFFIXES)}){other}")
    if found and not any_class:
        _ask(source, classed, walk.skipped)
    names = [text(name) for name, _ in classed] if found else []
    return Listing(source, sorted(loose) if loose else found, names, walk.skipped, walk.left_out, walk.dead)


def _ask(source: Path, classed: list[tuple[str, list[Picture]]], skipped: list[str]) -> None:
    """Raises DatasetError where folders may be something else than classes."""
    holding = [name for name, pictures in classed if pictures]
    if all(SPLIT.fullmatch(name) for name in holding):
        first = next((n for n in holding if "tr" in n.lower()), holding[0])
        raise DatasetError(
            f"{source}: these look like splits, not classes: {named(holding)}; name one of them: "
            f"`cmt data encode {source / first} ...`; {ANY}"
        )
    if len(holding) == 1:
        below = {p.name.split("/")[1] if p.name.count("/") > 1 else "" for p in dict(classed)[holding[0]]}
        if len(below) > 1 and "" not in below:
            raise DatasetError(
                f"{source}: holds one folder, {text(holding[0])}, and the images lie in {len(below):,} folders below it "
                f"({named(sorted(below))}); if those are the classes: `cmt data encode {source / holding[0]} ...`; {ANY}"
            )
    empty = [name for name, pictures in classed if not pictures]
    if empty:
        inside = [s for s in skipped if s.split("/")[0] in empty]
        holds = f" (other files: {named(inside)})" if inside else ""
        raise DatasetError(
            f"{source}: {len(empty):,} of {len(classed):,} class folders hold no image: {named(empty)}{holds}; remove them; {ANY}"
        )


class _Walk:
    """One walk through `source`, and what it passed over."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.skipped: list[str] = []
        self.left_out: list[str] = []
        self.dead: list[str] = []

    def below(self, folder: Path, label: int | None, above: set[tuple[int, int]]) -> list[Picture]:
        """All images in a folder and in those below it, sorted by name."""
        pictures, folders = self.entries(folder, label, above)
        for inner, inside in folders:
            pictures += self.below(inner, label, inside)
        return sorted(pictures)

    def entries(
        self, folder: Path, label: int | None, above: set[tuple[int, int]]
    ) -> tuple[list[Picture], list[tuple[Path, set[tuple[int, int]]]]]:
        """The images and the folders in a folder, which `above` (the folders it lies in, and itself) must not hold."""
        pictures, folders = [], []
        try:
            found = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            raise DatasetError(f"{folder}: cannot be read ({error.strerror})") from None
        for entry in found:
            path = folder / entry.name
            name = path.relative_to(self.source).as_posix()
            image = path.suffix.lower() in SUFFIXES and not debris(entry.name)
            about = self._stat(path)
            if about is None:
                if image:
                    pictures.append(Picture(name, -1, label))
                else:
                    (self.skipped if debris(entry.name) else self.dead).append(name)
            elif stat.S_ISDIR(about.st_mode):
                if debris(entry.name):
                    self.left_out.append(name)
                elif _identity(about) in above:
                    raise DatasetError(
                        f"{path}: is a link to a folder that it lies in itself, a circle; remove the link"
                    )
                else:
                    folders.append((path, above | {_identity(about)}))
            elif stat.S_ISREG(about.st_mode) and image:
                pictures.append(Picture(name, about.st_size, label))
            else:
                self.skipped.append(name)
        return pictures, folders

    @staticmethod
    def _stat(path: Path) -> os.stat_result | None:
        """Of what a name leads to; None where it is a link that leads nowhere."""
        try:
            return path.stat()
        except OSError as error:
            if error.errno in NOWHERE:
                return None
            raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino
