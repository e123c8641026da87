"""Classes of a data set: their numbers in the network, their names, how many rows each has, and the law of labels.

A label of a data set is a row of the network's table of labels. Numbers of a source that leave gaps (5, 17, 402) become
0, 1, 2 and are kept as `class_ids`; `data.class_ids` and `data.classes` put them where another network has them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError, one_line
from cmt_fast.data import arrays
from cmt_fast.data.archives import DatasetError, array
from cmt_fast.data.rows import Rows
from cmt_fast.diffusion.labels import Law, Some

SHOWN = 8  # classes that a line names
UNBALANCED = 2.0  # ratio of rows from which a line says so
FILE_BYTES = 1 << 30
MOST = 1 << 20  # a class number is below this
Given = tuple[int, ...] | Literal["stored"] | None


@dataclasses.dataclass(frozen=True)
class Classes:
    """labels (n,) int64 or None; classes: rows of the table of labels, 0 without; names: of all of them, () if they have none.

    ids: the source's own numbers of the classes, () where those are 0, 1, 2, ... or it has none.
    """

    labels: Tensor | None
    classes: int
    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def present(self) -> list[int]:
        """Classes that have rows."""
        return [] if self.labels is None else self.labels.unique().tolist()


def dense(numbers: list[int]) -> tuple[list[int], tuple[int, ...]]:
    """Labels as classes 0, 1, 2, ... without gaps, and their numbers of before, () where nothing changes."""
    own = sorted(set(numbers))
    if own == list(range(len(own))):
        return numbers, ()
    place = {number: k for k, number in enumerate(own)}
    return [place[number] for number in numbers], tuple(own)


def settled(own: Classes, class_ids: Given, classes: int | None, what: str) -> Classes:
    """Classes as `data.class_ids` and `data.classes` put them; what: the store or file. Raises DatasetError naming a key."""
    if class_ids is None and classes in (None, own.classes):
        return own
    key = "data.classes" if class_ids is None else "data.class_ids"
    if own.labels is None:
        raise DatasetError(f"{key}: {what} has no labels; leave the key out, or bring data with labels")
    if class_ids is None:
        raise DatasetError(
            f"data.classes: {classes}, and {what} has {_number(len(own.present))}: say which of the {classes} "
            f"they are, {_proposed(own, classes or 0)}"
        )
    if class_ids == "stored":
        if own.names and not own.ids:
            raise DatasetError(f"data.class_ids: {what} knows names alone ({_some(own.names)}); give a number for each")
        class_ids = own.ids or tuple(range(own.classes))
    of = list(range(own.classes)) if len(class_ids) == own.classes else own.present
    if len(class_ids) != len(of):
        raise DatasetError(
            f"data.class_ids: {len(class_ids)} numbers for the {_number(len(of))} of {what} ({_some(_called(own, of))})"
        )
    table = checked(class_ids, classes, what)
    to = torch.full((own.classes,), -1)
    to[torch.tensor(of)] = torch.tensor(class_ids)
    called, names = _called(own, of), [str(k) for k in range(table)]
    for k, name in zip(class_ids, called):
        names[k] = name
    plain = names == [str(k) for k in range(table)]
    return Classes(to[own.labels], table, () if plain else tuple(names))


def checked(class_ids: tuple[int, ...], classes: int | None, what: str) -> int:
    """Rows of the table of labels that `data.class_ids` and `data.classes` make. Raises DatasetError where they cannot be."""
    twice = sorted({k for k in class_ids if class_ids.count(k) > 1})
    if twice:
        raise DatasetError(f"data.class_ids: {twice[0]} is there twice; two classes of {what} would be one")
    table = classes or len(class_ids)
    if class_ids and max(class_ids) >= table:
        more = "" if classes else " (as many as there are ids)"
        raise DatasetError(
            f"data.class_ids: {max(class_ids)} is none of the classes 0 to {table - 1}{more}; set "
            f"data.classes to how many the network knows, {max(class_ids) + 1} or more"
        )
    return table


def expected(class_ids: Given, classes: int | None, own: int | None) -> int | None:
    """Rows of the table of labels as far as a recipe alone says, without its store; None where it leaves them open.

    own: `data.expects.classes`, of the store itself or of the table. Raises DatasetError for what no store can make right.
    """
    if class_ids is None and (classes is None or own in (None, classes)):
        return classes or own
    key, what = ("data.classes" if class_ids is None else "data.class_ids"), "data.expects"
    if own == 0:
        raise DatasetError(f"{key}: {what} has no labels; leave the key out, or expect how many classes there are")
    if class_ids is None:
        raise DatasetError(
            f"{key}: {classes}, and {what} has {_number(own or 0)}: say which they are, data.class_ids=[...]"
        )
    if class_ids == "stored":
        return classes or own
    table = checked(class_ids, classes, what)
    if own is not None and own != table and len(class_ids) > own:
        raise DatasetError(f"data.class_ids: {len(class_ids)} numbers for the {_number(own)} of {what}")
    return table


def of(data: Rows) -> Classes:
    """The classes of an opened data set."""
    return Classes(data.labels, data.classes, getattr(data, "class_names", ()), getattr(data, "class_ids", ()))


def names(data: Rows) -> list[str]:
    """What each class is called: by name, by the source's number, by the network's."""
    own = of(data)
    return _called(own, list(range(own.classes)))


def counts(data: Rows) -> Tensor:
    """Rows of each class, (classes,) int64; 1 each where the rows are not here, and only how many classes they have is known."""
    if data.labels is None:
        return torch.ones(data.classes, dtype=torch.int64)
    return torch.bincount(data.labels.cpu(), minlength=data.classes)


def drawn(data: Rows) -> int | Some:
    """What a teacher's trajectories are labelled with, each as often: the number of classes, or those that have rows."""
    own = of(data)
    present = own.present
    return own.classes if len(present) in (0, own.classes) else Some(tuple(present), own.classes)


def asks(data: Rows, table: int) -> str:
    """What to set so that the data's labels are those of a network with `table` classes."""
    own = of(data)
    if own.labels is None and own.classes and not data.n:  # they are not here
        which = f"data.class_ids=[...] data.classes={table}, with a number of 0 to {table - 1} for each"
        return f"if the data have {_number(own.classes)}, say which of its {table} they are: {which}"
    if own.labels is None:
        return f"the data have no labels, and its network wants one of {table} classes"
    if table < len(own.present):
        return f"the data have {_number(len(own.present))}, its network knows {table or 'none'}"
    return f"say which of its {table} classes the data's are: {_proposed(own, table)}"


def law(data: Rows, labels: str) -> Law:
    """The law of `eval.labels` on a data set. Raises ConfigError naming the key."""
    if not data.classes:
        if labels != "data" and not data.n:
            raise ConfigError(f"{labels!r}, and data.expects has no classes; set data.expects.classes", "eval.labels")
        if labels != "data":
            raise ConfigError(f"{labels!r}, and the data have no labels; valid is data", "eval.labels")
        return Law([], labels)
    if labels == "data" and data.labels is not None:
        return Law(counts(data), "data")
    if labels in ("data", "uniform"):  # rows that nobody counted have no proportions to follow
        return Law.uniform(counts(data).nonzero()[:, 0], data.classes)
    return Law(_file(Path(labels), data.classes), f"counts of {Path(labels).name}")


def line(data: Rows) -> str:
    """One line: `classes: 3 (5, 17, 402), 12 to 400 rows each; unbalanced 33:1`; classes without rows are named."""
    if data.labels is None:
        return (
            f"classes: {data.classes}, as data.expects has them"
            if data.classes
            else "classes: none, the rows have no labels"
        )
    own, n = of(data), counts(data)
    present = own.present
    rows = n[torch.tensor(present)]
    low, high = int(rows.min()), int(rows.max())
    named = _range(own, present)
    of_ = f" of the network's {own.classes}" if len(present) < own.classes else ""
    out = f"classes: {len(present)}{of_} ({named}), {f'{low:,} to {high:,}' if low < high else f'{low:,}'} rows each"
    if high >= UNBALANCED * low:
        out += f"; unbalanced {high / low:.3g}:1"
    absent = [k for k in range(own.classes) if not n[k]]
    if absent:
        out += f"; without rows: {_some(_called(own, absent))}"
    return out


def gaps(data: Rows) -> str:
    """What to do about numbers without rows in a table that nobody asked for: a line, or "" where there are none."""
    own = of(data)
    present = own.present
    if len(present) in (0, own.classes) or own.names:
        return ""
    ids = f"data.class_ids={_list(range(len(present)))}" if len(present) <= SHOWN else "data imported anew"
    return (
        f"the network's table has {own.classes} classes, as the labels reach to {present[-1]}, and {own.classes - len(present)} "
        f"of them have no rows: right for a network of {own.classes} classes; else {ids} makes them {len(present)}"
    )


def by_name(data: Rows, asked: str) -> list[int]:
    """Classes as typed, `5,17` or `cat,dog`: numbers of the source where it has its own, names, else the network's numbers.

    Raises ConfigError, its key --class, for one that is not there or has no rows.
    """
    own = of(data)
    if not own.classes:
        raise ConfigError("the data of this run have no labels", "--class")
    present = own.present or list(range(own.classes))  # of rows that never were here nobody knows which have some
    called, out = _called(own, present), []
    known = dict(zip(called, present))
    for word in _words(asked, called):
        if called.count(word) > 1:
            same = ", ".join(str(k) for k, name in zip(present, called) if name == word)
            raise ConfigError(f"{word!r} is the name of several classes; give a number of {same}", "--class")
        if word not in known and word.isdigit() and int(word) in present and not (own.ids or _numbered(own)):
            known[word] = int(word)
        if word not in known:
            raise ConfigError(
                f"{word!r} is no class with rows; there are {_some(_called(own, present), 20)}", "--class"
            )
        out.append(known[word])
    return out


def _words(asked: str, called: list[str]) -> list[str]:
    """`cat,dog` as names, of which some have commas themselves, as `tench, Tinca tinca`; the longest that fits is meant."""
    bare = lambda text: ",".join(part.strip() for part in text.split(","))
    known, parts, out = {bare(name): name for name in called}, bare(asked).split(","), []
    while parts:
        fits = [n for n in range(len(parts), 0, -1) if ",".join(parts[:n]) in known]
        n = fits[0] if fits else 1
        out.append(known.get(",".join(parts[:n]), parts[0]))
        parts = parts[n:]
    return out


def _file(path: Path, classes: int) -> Tensor:
    """Counts of each class from a file: `counts` (classes,) or `labels` (n,) of an .npz, labels of an .npy."""
    say = lambda text: ConfigError(f"{str(path)!r} {text}", "eval.labels")
    if path.suffix not in (".npy", ".npz"):
        raise say("is not valid; valid are data, uniform, and a file .npy or .npz of labels or counts")
    if not path.is_file():
        raise say("does not exist")
    if path.stat().st_size > FILE_BYTES:
        raise say(f"has {path.stat().st_size:,} bytes, that is too many")
    try:
        if path.suffix == ".npy":
            name, found = "labels", array(path.read_bytes(), str(path))
        else:
            held = arrays.read(path, dict.fromkeys(("counts", "labels"), FILE_BYTES))
            name = next(iter(held), "")
            found = held.get(name)
    except (OSError, ValueError) as error:
        raise say(f"cannot be read ({error})") from None
    if found is None:
        raise say("has no array called counts or labels")
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu" or int(found.min()) < 0:
        raise say(f"holds {name} that are {found.dtype} {found.shape}, not whole numbers (n,) from 0")
    if name == "counts" and (len(found) != classes or not found.any()):
        raise say(f"holds {len(found)} counts, {int(found.sum())} in all; the network has {classes} classes")
    if name == "labels" and int(found.max()) >= classes:
        raise say(f"holds the label {int(found.max())}; the network has the classes 0 to {classes - 1}")
    found = torch.from_numpy(found.astype(np.int64))
    return found if name == "counts" else torch.bincount(found, minlength=classes)


def _called(own: Classes, chosen: list[int]) -> list[str]:
    """What classes are called: by name, by the source's number, by the network's."""
    shown = lambda name: name if name.isprintable() else one_line(name)
    return [shown(own.names[k]) if own.names else str(own.ids[k]) if own.ids else str(k) for k in chosen]


def _numbered(own: Classes) -> bool:
    """Whether names are numbers themselves, as those of folders 0, 1, 10, 2: then a number that is asked for is a name."""
    return bool(own.names) and all(name.isdigit() for name in own.names)


def _range(own: Classes, chosen: list[int]) -> str:
    """`0 to 9`, or the first of their names."""
    run = chosen == list(range(chosen[0], chosen[0] + len(chosen))) and len(chosen) > 2
    numbers = _called(own, chosen)
    return f"{chosen[0]} to {chosen[-1]}" if run and numbers == [str(k) for k in chosen] else _some(numbers)


def _some(names: Any, shown: int = SHOWN) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def _list(numbers: Any) -> str:
    return "[" + ",".join(map(str, numbers)) + "]"


def _number(n: int) -> str:
    return f"{n:,} class{'es' * (n != 1)}"


def _proposed(own: Classes, table: int) -> str:
    """The two keys, with values where the source's own numbers fit into the table."""
    present = own.present
    ids = [own.ids[k] if own.ids else k for k in present]
    known = bool(own.ids or not own.names) and max(ids) < table
    if not known:
        which = _some(_called(own, present))
        return f"data.class_ids=[...] data.classes={table}, with a number of 0 to {table - 1} for each of {which}"
    short = _list(ids) if len(ids) <= SHOWN else "stored"
    return f"data.class_ids={short} data.classes={table} (the numbers that its source gave them)"
