"""What a stage's metrics.jsonl says, in 24 bytes a row: curves as columns, evaluations whole, the last rows as they stand.

A file of 500,000 rows is 120 MB as text and a gigabyte as Python's objects; what is asked of it is a curve, its two ends and the
evaluations. So the numbers of a training row are picked out of its text, and only what does not look like one is parsed as JSON.
`update` reads what came since the last one, for who looks again and again while the file grows; a file that was cut or replaced
meanwhile, as by a stage that goes on from a checkpoint, is read again from its start.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from cmt_fast.storage import sound
from cmt_fast.storage.metrics_log import backwards, parsed, seeds, unsealed

BLOCK = 1 << 22  # bytes that are read at once
RECENT = 11  # rows of training that are kept whole: ten spans of time
# a row as metrics_log.py writes it, with and without spaces; names and numbers between loss and lr are those of the objective
ROW = re.compile(
    rb'\{"kind": ?"train", ?"step": ?\d+, ?"nimg": ?(\d+)(?:, ?"\w+": ?[-+.\w]+)*?, ?"loss": ?([-+.\w]+)'
    rb'(?:, ?"\w+": ?[-+.\w]+)*?, ?"lr": ?([-+.\w]+)(?:, ?"\w+": ?[-+.\w]+)*?, ?"wall": ?\{.*\}\}'
)


class Record:
    """The rows of one file. In images: nimg, of every row of training; loss, lr: of the same rows; others: rows of other kinds;
    last_nimg: of the last row of any kind; lost: lines that are no rows, and so are left out; whole: bytes of all whole lines.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._of = path, seeds(path.parent)
        self._begin((0, 0))

    def _begin(self, file: tuple[int, int]) -> None:
        self.nimg, self.loss, self.lr = array("q"), array("d"), array("d")
        self.others: list[dict[str, Any]] = []
        self.last_nimg, self.lost, self._rows = 0, 0, 0
        self._file, self._offset, self._last = file, 0, b""
        self._first, self._recent = b"", deque[bytes](maxlen=RECENT)

    @classmethod
    def of(cls, path: Path) -> Record:
        """All of a file as it is now; of none, nothing."""
        return cls(path).update()

    @classmethod
    def newest(cls, path: Path) -> Record:
        """Its last row and its newest evaluation alone, found from the end: for lists of many runs."""
        out = cls(path)
        try:
            with open(sound.handle(path), "rb") as file:
                out._newest(file)
        except FileNotFoundError:
            pass
        except (OSError, sound.Unsound):
            out.lost = 1
        return out

    def _newest(self, file: BinaryIO) -> None:
        for end, line in backwards(file):
            self._offset = max(self._offset, end)
            if self._rows and b'"eval"' not in line:
                continue
            row = parsed(line, self._of)
            self.lost += row is None
            if row is None or "nimg" not in row:
                continue
            if not self._rows:
                self._rows, self.last_nimg = 1, row["nimg"]
            if row.get("kind") == "eval" and "steps" in row:
                self.others.append(row)
                break

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __len__(self) -> int:
        """Rows of all kinds."""
        return self._rows

    @property
    def whole(self) -> int:
        return self._offset

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """Its rows of a kind that is not "train"."""
        assert kind != "train", "rows of training are columns"
        return [row for row in self.others if row.get("kind") == kind]

    @property
    def first(self) -> dict[str, Any]:
        """The first row of training."""
        return parsed(self._first, self._of) or {}

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last RECENT rows of training, the newest last."""
        return [row for line in self._recent if (row := parsed(line, self._of))]

    def update(self) -> Record:
        """Read what is new; a line that is not whole yet is left for the next time, one that is none is left out.

        A file that cannot be read now, or is none, leaves what was known of it.
        """
        try:
            with open(sound.handle(self.path), "rb") as file:
                about = os.fstat(file.fileno())  # of this very file: the path may be another's by now
                if (about.st_dev, about.st_ino) != self._file or not self._stands(file, about.st_size):
                    self._begin((about.st_dev, about.st_ino))
                file.seek(self._offset)
                while block := file.read(BLOCK):
                    block += file.readline()
                    whole = block.rfind(b"\n") + 1
                    if whole:
                        self._take(block[: whole - 1].split(b"\n"))
                        self._offset += whole
                    if whole < len(block):
                        break
        except (OSError, sound.Unsound):
            pass
        return self

    def _stands(self, file: Any, size: int) -> bool:
        """Whether what was read last is still there: a file that was cut has other rows in its place."""
        if size < self._offset:
            return False
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _take(self, lines: list[bytes]) -> None:
        """Whole lines, after those before."""
        match, nimg, loss, lr, of = ROW.fullmatch, self.nimg, self.loss, self.lr, self._of
        for line in lines:
            text = unsealed(line, of)
            found = match(text) if text else None
            if found:
                try:
                    n, a, b = found.groups()
                    values = int(n), float(a), float(b)
                    if values[0] >= 1 << 62:
                        raise ValueError(values)
                except ValueError:
                    self._other(line)
                    continue
                nimg.append(values[0])
                loss.append(values[1])
                lr.append(values[2])
                self._first = self._first or line
                self._recent.append(line)
                self.last_nimg = values[0]
                self._rows += 1
            else:
                self._other(line)
        self._last = lines[-1] + b"\n"

    def _other(self, line: bytes) -> None:
        row = parsed(line, self._of)
        if row is None or (row.get("kind") in ("train", "eval") and "nimg" not in row):
            self.lost += 1
            return
        self._rows += 1
        self.last_nimg = row.get("nimg", self.last_nimg)
        if row.get("kind") != "train":
            self.others.append(row)
            return
        self.nimg.append(row["nimg"])
        for column, value in ((self.loss, row.get("loss")), (self.lr, row.get("lr"))):
            column.append(float("nan") if value is None else value)
        self._first = self._first or line
        self._recent.append(line)
