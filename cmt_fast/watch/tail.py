"""The end of a file that grows: each look reads what came since the last one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


class Tail:
    """The rows of a metrics.jsonl. A run that goes on from a checkpoint writes its file anew: then all of it is read again."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self._file, self._offset = (0, 0), 0

    def read(self) -> list[dict[str, Any]]:
        """All rows so far; a line that is not whole yet is left for the next look. A file that cannot be read has none."""
        try:
            with open(self.path, "rb") as f:
                about = self.path.stat()
                if (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset:
                    self._file, self._offset, self.rows = (about.st_dev, about.st_ino), 0, []
                f.seek(self._offset)
                new = f.read()
        except OSError:
            return self.rows
        whole, newline, _ = new.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                self.rows += [row] * isinstance(row, dict)
        return self.rows
