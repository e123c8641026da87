"""What is said of samples: gathered batch by batch on every rank, compared with the data set or with a reference file."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Eval
from cmt_fast.data.datasets import in_memory
from cmt_fast.data.rows import Rows
from cmt_fast.evaluation import distances, neighbours, references
from cmt_fast.evaluation.distances import Stream
from cmt_fast.evaluation.features import Extractor
from cmt_fast.evaluation.references import Reference
from cmt_fast.runtime import distributed

STANDARD = 50_000  # samples of a distance that may be called FID or FD-DINOv2
Decode = Callable[[Tensor], Tensor]


class Judge:
    """A feature space, what samples are compared with in it, and how they become what it looks at.

    The reference is what `file` says, else the moments of the data set, taken once. `decode`: latents (B, C, h, w) to
    images (B, 3, H, W) in [-1, 1], for spaces of images. `rows`: also precision and recall, which keep features.
    """

    def __init__(
        self, data: Rows, space: Extractor, file: Path | None = None, metric: str = "frechet",
        decode: Decode | None = None, rows: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.space, self.file, self.metric = data, space, file, metric
        self.decode, self.rows, self.name = decode, rows, space.name

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
    def real(self) -> Tensor:
        """The data set, or evenly spaced rows of a large one, on the CPU."""
        return in_memory(self.data).x.cpu()

    @functools.cached_property
    def directions(self) -> Tensor:
        return distances.directions(self.real[0].numel())

    @functools.cached_property
    def projected(self) -> Tensor:
        return distances.project(self.real, self.directions)

    @functools.cached_property
    def reference(self) -> Reference:
        """Raises ConfigError for a file of another extractor, or one without what precision and recall need."""
        if self.file is None:
            if self.space.images:
                raise ConfigError(f"eval.reference: is missing; {self.metric} compares with a file of statistics")
            features = self.space.features(self.real)
            return Reference(distances.moments(features), "the data set", self.name, len(self.real), features)
        found = references.read(self.file, self.metric, self.rows)
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

    def tally(self) -> Tally:
        """A fresh count of samples."""
        return Tally(self)

    def __call__(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Figures of samples (n, ...) with the labels (n,) that they were asked for, all on this rank."""
        tally = self.tally()
        tally.add(samples, labels)
        return tally.figures()


class Tally:
    """Samples as they come: moments of their features, right classes, and projections or features where those are used.

    Raises ConfigError at once when there is no reference to compare with.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, self.stream, self.reference = judge, Stream(), judge.reference
        self.right = self.labelled = 0
        self.kept: list[Tensor] = []
        self.slices: list[Tensor] = []

    def copy(self) -> Tally:
        """Another that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.stream, other.kept, other.slices = self.stream.copy(), list(self.kept), list(self.slices)
        return other

    def add(self, samples: Tensor, labels: Tensor | None) -> None:
        """samples: (B, ...) in data units; labels: (B,) or None."""
        judge = self.judge
        seen = judge.look(samples)
        features = judge.space.features(seen)
        self.stream.add(features)
        if judge.rows:
            self.kept.append(features.float().cpu())
        if judge.file is None:
            self.slices.append(distances.project(samples.cpu(), judge.directions))
        predicted = judge.space.classes(seen)
        if predicted is not None and labels is not None:
            self.right += int((predicted == labels.to(predicted.device)).sum())
            self.labelled += len(labels)

    def figures(self) -> dict[str, float]:
        """frechet; accuracy of labelled samples; precision and recall, or sliced_wasserstein. Every rank must call it."""
        judge = self.judge
        out = {"frechet": distances.frechet(_cpu(self.stream.over_ranks()[1]), _cpu(self.reference.moments))}
        if judge.file is None:
            made = distributed.gather_uneven(torch.cat(self.slices) if self.slices else None)
            out["sliced_wasserstein"] = distances.wasserstein(made, judge.projected)
        right, labelled = (int(distributed.sum_(torch.tensor(v))) for v in (self.right, self.labelled))
        if labelled:
            out["accuracy"] = right / labelled
        if judge.rows:
            made = distributed.gather_uneven(torch.cat(self.kept) if self.kept else None)
            assert self.reference.features is not None
            out["precision"], out["recall"] = neighbours.precision_recall(self.reference.features.cpu(), made)
        return out


def open_judge(
    data: Rows, config: Eval, space: Callable[[], Extractor], device: torch.device, decode: Callable[[], Decode] | None,
    rows: bool = False,
) -> Judge:  # fmt: skip
    """The judge that `config` asks for. space: the run's own features, for metric "frechet"; decode: opens the decoder of
    data that are latents.

    Raises ConfigError when a key that the metric needs is missing, or rows are no images and there is no decoder.
    """
    file = Path(config.reference) if config.reference else None
    if config.metric == "frechet":
        return Judge(data, space(), file, rows=rows)
    if config.weights is None:
        raise ConfigError(f"eval.weights: is missing; {config.metric} needs the file of its extractor's weights")
    if decode is None and (len(data.shape) != 3 or data.shape[0] not in (1, 3)):
        raise ConfigError(f"eval.metric: {config.metric} looks at images, and rows of this data are {data.shape}")
    from cmt_fast.evaluation.dinov2 import DinoV2
    from cmt_fast.evaluation.inception import Inception

    network = {"fid": Inception, "fd_dinov2": DinoV2}[config.metric](Path(config.weights), device)
    return Judge(data, network, file, config.metric, decode() if decode else None, rows)


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
    data, stream, kept = judge.data, Stream(), []
    n = min(n or data.n, data.n)
    index = torch.arange(n) * data.n // n
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.arange(min(keep, n)) * n // max(1, min(keep, n))] = keep > 0
    for i, place in enumerate(torch.arange(n).split(batch)):
        if i % distributed.size() == distributed.rank():
            rows = data.rows(index[place], torch.zeros_like(place))[0]  # the first draw, as `in_memory` takes
            features = judge.space.features(judge.look(rows))
            stream.add(features)
            kept.append(features[chosen[place].to(features.device)].cpu())
        advance(len(place))
    features = distributed.gather_uneven(torch.cat(kept) if kept else None) if keep else None
    return Reference(_cpu(stream.over_ranks()[1]), "own statistics", judge.name, n, features)


def _cpu(m: distances.Moments) -> distances.Moments:
    return distances.Moments(m.mean.cpu(), m.covariance.cpu())
