"""What judging needs of real data, as files of the run: RUN/reference/KEY.safetensors and KEY.json.

Written by the first that judges while the data are here, read by all others, whether they are here or not: a run that was
copied elsewhere is judged, and its report drawn, without its data. Nothing in them is a pickle. They hold the moments of both
feature spaces, features of at most 10,000 rows for precision and recall, projections for the sliced distance, the
sharpness, real rows for the picture, and figures of real rows against real rows (the floor), by number of samples.

They are of one key: the rows, the metric, the features, the reference file, the law of labels. Another key has other files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmt_fast.diffusion.labels import Law
from cmt_fast.evaluation import distances, sharpness
from cmt_fast.evaluation.distances import Moments
from cmt_fast.evaluation.second import Second

if TYPE_CHECKING:
    from cmt_fast.evaluation.judges import Judge

FOLDER, FORMAT = "reference", 1
ROWS = 10_000  # whose features are kept, at most
SHARP = 2000  # rows that say how sharp real ones are, at most
FEATURES_BYTES = 32 << 20  # of them, at most
LARGEST_BYTES = 50 << 20  # of projections; of more the quantiles are kept
SHOWN, POINTS = 10, 1500  # real rows for the picture: images, points


class Kept(NamedTuple):
    """about: key, n, source, labels, second, floor; tensors: mu, sigma, mu_2, sigma_2, features, features_2, fitted.*,
    projected, weights, high_energy, shown, each where there is one.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def moments(self) -> Moments:
        """Of the first space."""
        return Moments(self.tensors["mu"], self.tensors["sigma"])

    @property
    def moments_2(self) -> Moments:
        """Of the second."""
        return Moments(self.tensors["mu_2"], self.tensors["sigma_2"])

    @property
    def second(self) -> Second:
        """The second space, as it was fitted."""
        own = {k.removeprefix("fitted."): v for k, v in self.tensors.items() if k.startswith("fitted.")}
        return Second(tuple(self.about["shape"]), own)

    @property
    def sharpness(self) -> float | None:
        """The share of energy of real rows in high frequencies, None of rows that are no images."""
        return sharpness.share(self.tensors["high_energy"]) if "high_energy" in self.tensors else None


def read(folder: Path, key: dict[str, Any]) -> Kept | None:
    """What a run's folder keeps under this key; None where it keeps nothing, something else, or a file is damaged.

    A key of which a part is None fits whatever stands there: what cannot be looked up where the data, or a file, are not.
    """
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            about = json.loads(file.read_text("utf-8"))
            if about["format"] != FORMAT or not _fits(key, about["key"]):
                continue
            data = file.with_suffix(".safetensors").read_bytes()
            if xxhash.xxh3_128(data).hexdigest() == about["xxh3_128"]:
                return Kept(about, load(data))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def _fits(key: Any, theirs: Any) -> bool:
    if isinstance(key, dict) and isinstance(theirs, dict):
        return all(_fits(v, theirs.get(k)) for k, v in key.items())
    return key is None or key == theirs


def write(folder: Path, kept: Kept) -> None:
    """Both files, each whole or not there; the checksum in the second says that they belong together."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    name = xxhash.xxh3_64(json.dumps(kept.about["key"], sort_keys=True).encode()).hexdigest()
    data = save({k: v.contiguous() for k, v in kept.tensors.items()})
    kept.about["xxh3_128"] = xxhash.xxh3_128(data).hexdigest()
    for ending, content in (("safetensors", data), ("json", json.dumps(kept.about, indent=1).encode())):
        temporary = folder / FOLDER / f".tmp-{name}.{ending}-{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(folder / FOLDER / f"{name}.{ending}")


def take(judge: Judge, key: dict[str, Any]) -> Kept:
    """From the data of a judge. Raises ConfigError where they, or its reference, cannot be had."""
    real, weights, known = judge.real, judge.weights, judge.reference
    index = chosen(judge.labels, judge.law if weights is not None else None, len(real), ROWS)
    second, features = Second(tuple(judge.data.shape)).fit(real)
    mu_2, sigma_2 = distances.moments(features, weights)
    tensors = {
        "mu": known.moments.mean.cpu(),
        "sigma": known.moments.covariance.cpu(),
        "mu_2": mu_2,
        "sigma_2": sigma_2,
    }
    tensors |= {f"fitted.{k}": v for k, v in second.fitted.items()}
    tensors["features_2"] = features[_few(index, features.shape[1])].clone()
    if known.features is not None:
        own = index if judge.file is None else torch.arange(len(known.features))
        tensors["features"] = known.features[_few(own, known.features.shape[1])].float().cpu()
    if weights is not None:
        tensors["weights"] = weights
    if judge.file is None:
        tensors["projected"] = judge.projected
        if judge.projected.nbytes > LARGEST_BYTES:
            q = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
            tensors["projected"] = distances.quantiles(judge.projected, weights, q)
            tensors.pop("weights", None)
    if sharpness.served(judge.data.shape):
        each = [sharpness.energies(part) for part in real[index[:: -(-len(index) // SHARP)]].split(256)]
        tensors["high_energy"] = torch.stack(each).sum(0)
    tensors["shown"] = real[_shown(judge.labels, judge.law, len(real), len(judge.data.shape) == 3)].clone()
    about = {
        "format": FORMAT, "key": key, "n": known.n, "source": known.source, "labels": known.labels, "rows": len(real),
        "shape": list(judge.data.shape), "second": second.name, "floor": {},
    }  # fmt: skip
    return Kept(about, tensors)


def _few(index: Tensor, width: int) -> Tensor:
    """As many of these rows, evenly spaced, as stay within FEATURES_BYTES."""
    n = max(1, min(len(index), FEATURES_BYTES // (4 * width)))
    return index[torch.arange(n) * len(index) // n]


def chosen(labels: Tensor | None, law: Law | None, rows: int, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced; with a law as many of every class as makes the classes' shares its own."""
    if law is None or labels is None:
        n = min(rows, most)
        return torch.arange(n) * rows // n
    have = torch.bincount(labels, minlength=len(law.counts)).double()
    present = [k for k in law.present.tolist() if have[k]]
    total = min(float((have[present] / law.shares[present]).min()), float(most))
    parts = []
    for k in present:
        own, n = (labels == k).nonzero()[:, 0], max(1, int(total * float(law.shares[k])))
        parts.append(own[torch.arange(n) * len(own) // n])
    return torch.cat(parts).sort().values


def _shown(labels: Tensor | None, law: Law | None, rows: int, images: bool) -> Tensor:
    """Rows for the picture: one of each class in order, as pictures of samples have them; without classes evenly spaced."""
    n = min(rows, SHOWN if images else POINTS)
    if labels is None or law is None or not images or not len(law.counts):
        return torch.arange(n) * rows // n
    asked = Law.uniform(law.present, len(law.counts))(torch.arange(SHOWN))
    assert asked is not None
    out, met = [], dict.fromkeys(asked.tolist(), 0)
    for k in asked.tolist():
        own = (labels == k).nonzero()[:, 0]
        if len(own):
            out.append(int(own[met[k] % len(own)]))
        met[k] += 1
    return torch.tensor(out)
