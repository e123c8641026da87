"""Reference statistics of a data set: our own files, ADM's and EDM's .npz, EDM2's .pkl. Every number in them is checked.

Our files name their extractor; the others do not, so they pass for their protocol's network if the width is right,
and a figure says whose reference it is against.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.data import arrays
from cmt_fast.evaluation.distances import Moments
from cmt_fast.storage import files
from cmt_fast.storage.files import save_tensors

WIDEST = 8192  # features; a covariance of them is 512 MB
LARGEST = 1 << 33  # bytes of an array of features or images
WIDTHS = {"fid": 2048, "fd_dinov2": 1024}


class Reference(NamedTuple):
    """extractor: "" in files that do not say; source: whose file; features (M, F) or images (M, H, W, 3) for recall.

    labels: the law of labels of the rows behind it, as `eval.labels` has it, "" in files that do not say.
    """

    moments: Moments
    source: str
    extractor: str = ""
    n: int | None = None
    features: Tensor | None = None
    images: np.ndarray | None = None
    labels: str = ""


def read(path: Path, metric: str, rows: bool = False) -> Reference:
    """metric: which part of an EDM2 file; rows: also what precision and recall are taken from. Raises ConfigError."""
    readers = {".npz": _npz, ".safetensors": _safetensors, ".pkl": _edm2}
    if path.suffix not in readers:
        raise ConfigError(f"eval.reference: {str(path)!r} is none of {', '.join(readers)}")
    if not path.is_file():
        raise ConfigError(f"eval.reference: {str(path)!r} does not exist")
    found, facts = readers[path.suffix](path, metric, rows)
    mean, covariance = _checked(path, found["mu"], found["sigma"])
    width = len(mean)
    if not facts.get("extractor") and width != WIDTHS.get(metric):
        other = f"{metric} has {WIDTHS[metric]}" if metric in WIDTHS else f"{metric} needs statistics that name theirs"
        raise ConfigError(f"eval.reference: {str(path)!r} names no extractor and has {width} features; {other}")
    features = found.get("features")
    if features is not None:
        features = torch.as_tensor(features).float()
        if features.ndim != 2 or features.shape[1] != width or not torch.isfinite(features).all():
            raise ConfigError(f"eval.reference: features of {str(path)!r} are not finite numbers (M, {width})")
    return Reference(Moments(mean, covariance), **facts, features=features, images=found.get("images"))


def write(path: Path, reference: Reference) -> None:
    """Our file: .npz or .safetensors. Raises ConfigError for another ending."""
    held = {"mu": reference.moments.mean.cpu(), "sigma": reference.moments.covariance.cpu()}
    if reference.features is not None:
        held["features"] = reference.features.float().cpu()
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"--make-reference: {str(path)!r} is none of .npz, .safetensors")
    with files.by_rename(path) as temporary:
        _write(temporary, path.suffix, held, reference)


def _write(path: Path, suffix: str, held: dict[str, torch.Tensor], reference: Reference) -> None:
    if suffix == ".npz":
        about = {"num_images": np.int64(reference.n), "extractor": np.array(reference.extractor)}
        about["labels"] = np.array(reference.labels)
        with open(path, "wb") as file:
            np.savez(file, **{k: v.numpy() for k, v in held.items()}, **about)
    else:
        about = {"num_images": str(reference.n), "extractor": reference.extractor, "labels": reference.labels}
        save_tensors(path, held, about)


def _npz(path: Path, metric: str, rows: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    wanted = {"mu": WIDEST * 8, "sigma": WIDEST**2 * 8, "num_images": 64, "extractor": 4096, "labels": 4096}
    wanted |= {"features": LARGEST, "arr_0": LARGEST} if rows else {}
    try:
        found = arrays.read(path, wanted)
    except (OSError, arrays.NoArrays) as error:
        raise ConfigError(f"eval.reference: {str(path)!r} is no sound .npz file ({error})") from None
    for key in ("mu", "sigma"):
        if key not in found:
            raise ConfigError(f"eval.reference: {str(path)!r} has no array called {key!r}")
    ours = "extractor" in found
    facts: dict[str, Any] = {"source": "own statistics" if ours else "mu and sigma as ADM and EDM publish them"}
    if ours:
        facts |= {"extractor": str(found["extractor"]), "labels": str(found.get("labels", "data"))}
        facts["n"] = int(found["num_images"]) if "num_images" in found and found["num_images"].shape == () else None
    images = found.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise ConfigError(
            f"eval.reference: arr_0 of {str(path)!r} is {images.dtype} {images.shape}, not bytes (M, H, W, 3)"
        )
    return {**found, "images": images}, facts


def _safetensors(path: Path, metric: str, rows: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            about, keys = file.metadata() or {}, set(file.keys())
            for key in {"mu", "sigma"} & keys:
                if math.prod(file.get_slice(key).get_shape()) > WIDEST**2:
                    raise ValueError(f"{key} has more than {WIDEST} x {WIDEST} numbers")
            wanted = {"mu", "sigma"} | ({"features"} if rows else set())
            found = {key: file.get_tensor(key) for key in wanted & keys}
        n = int(about["num_images"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"eval.reference: {str(path)!r} is no sound file of statistics ({error})") from None
    if {"mu", "sigma"} - keys or not about.get("extractor"):
        raise ConfigError(f"eval.reference: {str(path)!r} has no mu and sigma, or names no extractor")
    return found, {
        "source": "own statistics",
        "extractor": about["extractor"],
        "n": n,
        "labels": about.get("labels", "data"),
    }


def _edm2(path: Path, metric: str, rows: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    from cmt_fast.safe_pickle import sandbox

    try:
        with tempfile.TemporaryDirectory(prefix="cmt-reference-") as folder:
            about = sandbox.read(path, Path(folder))
            tensors = load_file(Path(folder) / sandbox.RESULTS[0])
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"eval.reference: {str(path)!r} is no file of EDM2's statistics ({error})") from None
    parts = [m for m in WIDTHS if {f"{m}.mu", f"{m}.sigma"} <= tensors.keys()]
    if metric not in parts:
        raise ConfigError(f"eval.reference: {str(path)!r} holds no {metric}; it holds {', '.join(parts) or 'none'}")
    n = about.get("num_images") if isinstance(about, dict) else None
    facts = {"source": "EDM2", "n": n if isinstance(n, int) else None}
    return {key: tensors[f"{metric}.{key}"] for key in ("mu", "sigma")}, facts


def _checked(path: Path, mu: Any, sigma: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance as float64, or a ConfigError that says which of the two cannot be one and why."""
    where = f"eval.reference: {str(path)!r}:"
    try:
        mean, covariance = (torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x) for x in (mu, sigma))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} mu or sigma is no array of numbers ({error})") from None
    if mean.ndim != 1 or not 1 <= len(mean) <= WIDEST or covariance.shape != (len(mean), len(mean)):
        raise ConfigError(f"{where} mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, not (F,) and (F, F)")
    if not mean.is_floating_point() or not covariance.is_floating_point():
        raise ConfigError(f"{where} mu is {mean.dtype} and sigma {covariance.dtype}, not floating point")
    mean, covariance = mean.double(), covariance.double()
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ConfigError(f"{where} mu or sigma is not finite")
    largest = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > 1e-6 * largest:  # float32 storage rounds to 6e-8 of a number
        raise ConfigError(f"{where} sigma is not symmetric")
    covariance = (covariance + covariance.T) / 2
    lowest, highest = (float(v) for v in torch.linalg.eigvalsh(covariance)[[0, -1]])
    if lowest < -1e-6 * max(highest, 0.0) or highest < 0:
        raise ConfigError(f"{where} sigma has the eigenvalue {lowest:.3g}, a covariance has none below zero")
    return mean, covariance
