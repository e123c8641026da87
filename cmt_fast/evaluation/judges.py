"""What is said of samples: gathered batch by batch on every rank, compared with the data set or with a reference file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Eval
from cmt_fast.data import classes
from cmt_fast.data.datasets import in_memory
from cmt_fast.data.rows import Dataset, Rows, opened
from cmt_fast.diffusion.labels import Law
from cmt_fast.evaluation import distances, references
from cmt_fast.evaluation.distances import Stream
from cmt_fast.evaluation.features import Extractor
from cmt_fast.evaluation.kept import Kept
from cmt_fast.evaluation.references import Reference
from cmt_fast.evaluation.roots import Roots
from cmt_fast.runtime import distributed, signals

STANDARD = 50_000  # samples of a distance that may be called FID or FD-DINOv2
Decode = Callable[[Tensor], Tensor]


class Judge:
    """A feature space, what samples are compared with in it, and how they become what it looks at.

    The reference is what `file` says, else the moments of the data set, taken once. `decode`: latents (B, C, h, w) to
    images (B, 3, H, W) in [-1, 1], for spaces of images. `rows`: also precision and recall, which keep features. `law`: of
    the samples' labels; the data set is weighted to the same, class by class (default: the data's own, nothing is weighted).
    device: where neighbours are looked for.
    """

    def __init__(
        self, data: Rows, space: Extractor, file: Path | None = None, metric: str = "frechet",
        decode: Decode | None = None, rows: bool = False, law: Law | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.law, self.device = law, device or torch.device("cpu")
        self.data, self.space, self.file, self.metric = data, space, file, metric
        self.decode, self.rows, self.name = decode, rows, space.name
        self.kept: Kept | None = None  # what a run keeps of real data, in their place
        self.roots = Roots()  # of its references; a run keeps them
        self.expected = (
            0  # samples; of reports and `cmt eval`, whose figures are more than evaluations in training have
        )

    def title(self, n: int) -> str:
        """What the distance of n samples is called: FID and FD-DINOv2 are names of their protocols alone."""
        standard = self.space.short and self.space.published and n == STANDARD
        return self.space.short if standard else f"frechet ({n:,} samples)"

    def look(self, x: Tensor) -> Tensor:
        """Rows in data units as the feature space wants them: images, or on the CPU as they are."""
        if not self.space.images:
            return x.cpu()
        return self.decode(x) if self.decode else x

    @functools.cached_property
    def _rows(self) -> Dataset:
        return in_memory(self.data)

    @functools.cached_property
    def real(self) -> Tensor:
        """The data set, or evenly spaced rows of a large one, on the CPU."""
        return self._rows.x.cpu()

    @property
    def here(self) -> bool:
        """Whether the data are, else what is kept of them has to do. Data that were not opened yet are opened."""
        return getattr(self.data, "here", True)

    @property
    def stands(self) -> bool:
        """Whether what is kept of the data stands for them: of a run that is read they are opened only where it does not."""
        return self.kept is not None and (hasattr(self.data, "opened") or not self.here)

    @property
    def labels(self) -> Tensor | None:
        """Of the rows of `real`, (N,)."""
        return None if self._rows.labels is None else self._rows.labels.cpu()

    @functools.cached_property
    def weights(self) -> Tensor | None:
        """By which rows of `real` count, (N,) of sum 1, None for all alike. Raises ConfigError for classes without rows."""
        if self.kept is not None and self.stands:
            return self.kept.tensors.get("weights")
        return class_weights(self._rows.labels, self.law, self.file is None) if self.law else None

    @functools.cached_property
    def directions(self) -> Tensor:
        return distances.directions(math.prod(self.data.shape))

    @functools.cached_property
    def projected(self) -> Tensor:
        kept = self.kept  # of very many rows it has quantiles alone
        if kept is not None and (self.stands or len(kept.tensors["projected"]) == kept.about["rows"]):
            return kept.tensors["projected"]
        return distances.project(self.real, self.directions)

    @functools.cached_property
    def reference(self) -> Reference:
        """Raises ConfigError for a file of another extractor, or one without what precision and recall need."""
        kept = self.kept
        if kept is not None and not (self.rows and self.here) and (self.file is None or not self.file.is_file()):
            about, features = kept.about, kept.tensors.get("features")
            return Reference(kept.moments, about["source"], self.name, about["n"], features, labels=about["labels"])
        if self.file is None:
            if self.space.images:
                raise ConfigError(f"eval.reference: is missing; {self.metric} compares with a file of statistics")
            check_rows(self.data.n, None)
            features, source = self.space.features(self.real), "the data set"
            if self.weights is not None:
                if self.rows:
                    raise ConfigError("--precision-recall: counts rows as they are in the data, set eval.labels=data")
                assert self.law
                source += f", its classes weighted ({self.law.text()})"
            known = distances.moments(features, self.weights)
            return Reference(known, source, self.name, len(self.real), features)
        found = references.read(self.file, self.metric, self.rows or self.file.suffix == ".safetensors")
        if found.labels and self.law and not _alike(found.labels, self.law, self.data):
            raise ConfigError(
                f"eval.labels: {self.law.name!r}, and the rows behind {str(self.file)!r} have the labels {found.labels!r}; "
                f"set eval.labels={found.labels}, or make the file anew"
            )
        if found.extractor and found.extractor != self.name:
            raise ConfigError(
                f"eval.reference: {str(self.file)!r} was made with {found.extractor!r}, not with {self.name!r}; "
                "statistics of two extractors are not compared"
            )
        if self.rows and found.features is None:
            if found.images is None:
                raise ConfigError(f"eval.reference: {str(self.file)!r} holds no features for precision and recall")
            found = found._replace(features=self._of_images(found.images), images=None)
        return found

    def _of_images(self, images) -> Tensor:
        """ADM's images (M, H, W, 3) of bytes -> features (M, F): midpoints of bytes come back as those bytes."""
        bytes_ = torch.from_numpy(images).permute(0, 3, 1, 2)
        return torch.cat([self.space.features((b.float() - 127.5) / 127.5).cpu() for b in bytes_.split(64)])

    def caution(self, n: int) -> str:
        """What is to be known of a distance of n samples, "" where there is nothing: fewer rows than features."""
        width, against = len(self.reference.moments.mean), self.reference.n
        few = [f"{n:,} samples"] * (n <= width) + [f"{against or 0:,} rows of the reference"] * (
            against is not None and against <= width
        )
        if not few:
            return ""
        return f"{' and '.join(few)} for {width:,} features: covariances are not of full rank, and distances are biased"


def open_judge(
    data: Rows, config: Eval, space: Callable[[], Extractor], device: torch.device, decode: Callable[[], Decode] | None,
    rows: bool = False, law: Law | None = None,
) -> Judge:  # fmt: skip
    """The judge that `config` asks for. space: the run's own features, for metric "frechet"; decode: opens the decoder of
    data that are latents; rows, law: as of Judge.

    Raises ConfigError when a key that the metric needs is missing, or rows are no images and there is no decoder.
    """
    file = Path(config.reference) if config.reference else None
    if config.metric == "frechet":
        return Judge(data, space(), file, rows=rows, law=law, device=device)
    if config.weights is None:
        raise ConfigError(f"eval.weights: is missing; {config.metric} needs the file of its extractor's weights")
    if decode is None and (len(data.shape) != 3 or data.shape[0] not in (1, 3)):
        raise ConfigError(f"eval.metric: {config.metric} looks at images, and rows of this data are {data.shape}")
    from cmt_fast.evaluation.dinov2 import DinoV2
    from cmt_fast.evaluation.inception import Inception

    network = {"fid": Inception, "fd_dinov2": DinoV2}[config.metric](Path(config.weights), device)
    return Judge(data, network, file, config.metric, decode() if decode else None, rows, law, device)


def check_rows(n: int, reference: str | None) -> None:
    """Raises ConfigError where samples are to be compared with too few rows of the data set. reference: of `eval`."""
    if n == 1 and reference is None:
        raise ConfigError(
            "data: has 1 row; the distance to it that judges a run needs 2 or more; to learn one image by heart store two "
            "copies of it, or name statistics of others as eval.reference"
        )


def check_files(config: Eval) -> None:
    """Raises ConfigError when a file that the metric needs is not there: said before a run is trained, not after it."""
    if config.metric != "frechet" and config.weights is None:
        raise ConfigError(f"eval.weights: is missing; {config.metric} needs the file of its extractor's weights")
    for key in ("weights", "reference"):
        file = getattr(config, key)
        if file and not Path(file).is_file():
            raise ConfigError(
                f"eval.{key}: {file!r} is no file; fetch it, or train with eval.metric=frechet eval.{key}=null"
            )


def make_reference(judge: Judge, n: int | None, batch: int, keep: int, advance: Callable[[int], None]) -> Reference:
    """Moments of n rows of the data set (all of them; n fewer are evenly spaced), and the features of `keep` of them.

    Batches go round the ranks; every rank must call it. advance(rows done) is told of the progress.
    """
    data, stream, kept = opened(judge.data), Stream(), []
    n = min(n or data.n, data.n)
    if n < 2:
        raise ConfigError(f"data: statistics of {n} row; 2 are needed")
    index = torch.arange(n) * data.n // n
    labels = None if data.labels is None else data.labels[index]
    weights = class_weights(labels, judge.law) if judge.law else None
    keep = 0 if weights is not None else keep  # neighbours count rows as they are
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.arange(min(keep, n)) * n // max(1, min(keep, n))] = keep > 0
    for i, place in enumerate(torch.arange(n).split(batch)):
        if i % distributed.size() == 0:  # every rank has had as many
            signals.look()
        if i % distributed.size() == distributed.rank():
            rows = data.rows(index[place], torch.zeros_like(place))[0]  # the first draw, as `in_memory` takes
            features = judge.space.features(judge.look(rows))
            stream.add(features, None if weights is None else weights[place])
            kept.append(features[chosen[place].to(features.device)].cpu())
        advance(len(place))
    features = distributed.gather_uneven(torch.cat(kept) if kept else None) if keep else None
    law = judge.law.name if judge.law and len(judge.law.counts) else ""
    return Reference(_cpu(stream.over_ranks()[1]), "own statistics", judge.name, n, features, labels=law)


def class_weights(labels: Tensor | None, law: Law, whole: bool = True) -> Tensor | None:
    """w_i = q_y / n_y of rows with the labels y (N,): classes weigh as the law's shares q, rows of a class alike; sum 1.

    None where the law is the data's own, or all weights are equal. Raises ConfigError for a class without rows to compare with;
    not where these rows are not the `whole` of what is compared with: then that class counts for nothing.
    """
    if labels is None or law.name == "data":
        return None
    n = torch.bincount(labels.cpu(), minlength=len(law.counts))
    missing = [int(k) for k in law.present if not n[k]]
    if missing and whole:
        raise ConfigError(
            f"eval.labels: {law.name!r} draws class {missing[0]}, of which there are no rows to compare with"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    w = (law.shares / n.clamp(min=1))[labels.cpu()]
    return None if bool((w == w[0]).all()) else w / w.sum() if missing else w


def _alike(name: str, law: Law, data: Rows) -> bool:
    """Whether statistics of labels by `name` are comparable with samples of a law: the same one, or data that are even."""
    even = {name, law.name} == {"data", "uniform"} and Law(classes.counts(data), "data").even
    return name == law.name or not len(law.counts) or even


def _cpu(m: distances.Moments) -> distances.Moments:
    return distances.Moments(m.mean.cpu(), m.covariance.cpu())
