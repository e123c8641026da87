"""Square roots of references' covariances, each taken once: of 2,048 features it is half a minute of a processor.

A root belongs to the bytes of its covariance, by whose checksum it is found again: in memory, and as
RUN/reference/root-CHECKSUM.safetensors where there is a folder and the root is worth a file. Nothing can go out of step: other
moments have another checksum, and a file that was damaged is no root.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmt_fast.evaluation import distances
from cmt_fast.evaluation.distances import Against, Moments
from cmt_fast.runtime import distributed
from cmt_fast.storage import files, sound

WORTH = 256  # features, from which on a root is kept as a file: of fewer it is taken in a blink
HELD = 4  # in memory


class Roots:
    """Those of one run. folder: where they are kept, if it is in a run that can be written to."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Against] = {}

    def __call__(self, known: Moments) -> Against:
        """Distances to these moments; every rank must call it. Raises FloatingPointError as `distances.frechet`."""
        known = distances.finite("first", known)
        key = xxhash.xxh3_128(known.mean.numpy()).hexdigest()[:8] + _checksum(known.covariance)
        if key not in self._known:
            while len(self._known) >= HELD:
                self._known.pop(next(iter(self._known)))
            self._known[key] = Against(known, self._root(known.covariance))
        return self._known[key]

    def _root(self, covariance: Tensor) -> Tensor:
        """Read or taken by the first rank, for all."""
        root = torch.zeros_like(covariance)
        if distributed.rank() == 0:
            file = self.folder / f"root-{_checksum(covariance)[:16]}.safetensors" if self._kept(covariance) else None
            found = _read(file, covariance) if file else None
            root = distances.square_root(covariance) if found is None else found
            if file and found is None:
                with files.unless_refused():
                    _write(file, covariance, root)
        return distributed.tensor_of_first(root)

    def _kept(self, covariance: Tensor) -> bool:
        return self.folder is not None and self.folder.parent.is_dir() and len(covariance) >= WORTH


def _checksum(x: Tensor) -> str:
    return xxhash.xxh3_128(x.contiguous().numpy()).hexdigest()


def _write(file: Path, covariance: Tensor, root: Tensor) -> None:
    file.parent.mkdir(exist_ok=True)
    root = root.contiguous()
    files.write_bytes(file, save({"root": root}, {"of": _checksum(covariance), "xxh3_128": _checksum(root)}))


def _read(file: Path, covariance: Tensor) -> Tensor | None:
    """The root that was kept for this covariance; None where there is none, or it is damaged."""
    try:
        data = sound.data(file, 1 << 34)
        root = load(data)["root"].clone()
        about = _about(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    same = about == {"of": _checksum(covariance), "xxh3_128": _checksum(root)} and root.shape == covariance.shape
    return root if same else None


def checked(file: Path) -> None:
    """Raises FileNotFoundError, and ValueError where the root that is kept is not what was written."""
    data = sound.data(file, 1 << 34)
    try:
        wrong = _about(data)["xxh3_128"] != _checksum(load(data)["root"])
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        wrong = True
    if wrong:
        raise sound.Unsound(file, "does not match its checksum")


def _about(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON after eight bytes of its length."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
