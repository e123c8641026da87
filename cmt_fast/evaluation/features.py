"""Feature spaces that need no weights from elsewhere: the data themselves, and a small classifier trained on them.

Inception (FID) and DINOv2 (FD-DINOv2) have files of their own beside this one.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.data.datasets import in_memory
from cmt_fast.data.rows import Rows
from cmt_fast.storage import files, sound
from cmt_fast.storage.files import save_tensors, unless_refused
from cmt_fast.storage.sound import Unsound

FILE = "extractor.safetensors"
GRID = 8  # fields along a side
WHOLE = 2048  # numbers of a row that are features one by one, as many as Inception has


class Extractor(Protocol):
    """A feature space. name: network, hash of its weights, resize rule; what is stored with statistics and compared.

    images: whether it looks at pixels (B, 1 or 3, H, W) in [-1, 1], else at rows as the data set has them.
    short: what the Fréchet distance in it is called on 50,000 samples, where `published` weights are used.
    """

    name: str
    images: bool
    short: str
    published: bool

    def features(self, x: Tensor) -> Tensor: ...

    def classes(self, x: Tensor) -> Tensor | None: ...


class Identity:
    """The data themselves as features, for vectors."""

    name, images, short, published = "identity", False, "", False

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def classes(self, x: Tensor) -> None:
        return None


class Pooled(Identity):
    """Images of many numbers, averaged over a grid of GRID x GRID fields: a covariance of all of them would take minutes a
    distance and be of far lower rank than size, as 64 x 64 x 3 numbers are more than there are samples.
    """

    name = f"pooled-{GRID}"

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.float(), GRID).flatten(1)


class Classifier(nn.Module):
    """A 64-32 MLP trained on the real images from a fixed seed; its last hidden layer is the feature space.

    Small on purpose: seconds on a CPU, the same weights every time on one machine, stored with its hash.
    """

    images, short, published = False, "", False

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU())
        self.head = nn.Linear(32, classes)
        self.name = "classifier-64-32"

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, 32)."""
        return self.body(x.flatten(1))

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,) the likeliest class."""
        return self.head(self.body(x.flatten(1))).argmax(1)

    def differentiable(self, x: Tensor) -> Tensor:
        """Features with gradient, for the distance "features". (N, ...) -> (N, 32)."""
        return self.body(x.flatten(1))


def train_classifier(data: Rows, seed: int = 0, epochs: int = 40, batch: int = 128) -> Classifier:
    """AdamW 3e-3 with linear decay on all rows, cross-entropy, from `seed`; leaves the global generator as it was."""
    data = in_memory(data)
    assert data.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.x[0].numel(), data.classes)
        steps = epochs * -(-len(data.x) // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(data.x)).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(net.head(net.body(data.x[rows].flatten(1))), data.labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def extractor(data: Rows, cache: Path) -> Extractor:
    """The run's feature space: the classifier for labelled images (kept in `cache`), else the data themselves, averaged over
    fields where they are images of more than WHOLE numbers.
    """
    if not data.classes or len(data.shape) == 1:
        return Pooled() if len(data.shape) == 3 and math.prod(data.shape) > WHOLE else Identity()
    file = cache / FILE
    with torch.random.fork_rng(devices=[]):  # what is drawn here is read over
        net = Classifier(math.prod(data.shape), data.classes)
    known = _known(cache)
    try:
        digest = _load(net, file)
        if known and _name(digest) not in known:
            raise Unsound(file, f"is not what figures of this run are of ({', '.join(sorted(known))})")
    except (FileNotFoundError, Unsound) as error:
        digest = _again(data, net, file, known, error if isinstance(error, Unsound) else None)
    net.eval().requires_grad_(False)
    net.name = _name(digest)
    return net


def checked(file: Path) -> None:
    """Raises FileNotFoundError, and Unsound where the classifier that is kept is not what was written."""
    raw = sound.data(file)
    try:
        body = {name: tuple(t.shape) for name, t in load(raw).items()}
        with torch.random.fork_rng(devices=[]):  # what is drawn here is read over
            net = Classifier(body["body.0.weight"][1], body["head.bias"][0])
    except (ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise Unsound(file, f"cannot be read ({' '.join(str(error).split())[:200]})") from None
    known, digest = _known(file.parent), _load(net, file)
    if known and _name(digest) not in known:
        raise Unsound(file, f"is not what figures of this run are of ({', '.join(sorted(known))})")


def _load(net: Classifier, file: Path) -> str:
    """The weights that are kept, and their checksum. Raises FileNotFoundError, Unsound."""
    raw = sound.data(file)
    try:
        net.load_state_dict(load(raw))
        about = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}
    except (ValueError, RuntimeError, SafetensorError, AttributeError, RecursionError) as error:
        raise Unsound(file, f"cannot be read ({' '.join(str(error).split())[:200]})") from None
    digest = _digest(net)
    if about.get(sound.SUM, digest) != digest or (sound.SUM not in about and digest in about.values()):
        raise Unsound(file, "does not match its checksum")
    return digest


def _again(data: Rows, net: Classifier, file: Path, known: set[str], wrong: Unsound | None) -> str:
    """The weights trained anew, and kept; of a damaged file if they are those that it had. Returns their checksum.

    Raises ConfigError where they cannot be had: figures of other features mean something else.
    """
    what = f"RUN: {file} {wrong.why if wrong else ''}; figures of this run are in its features"
    try:
        net.load_state_dict(train_classifier(data).state_dict())
    except ConfigError as error:
        if wrong is None:
            raise
        raise ConfigError(f"{what}, and it cannot be trained again here ({error})") from None
    digest = _digest(net)
    if wrong and known and _name(digest) not in known:
        raise ConfigError(
            f"{what}, and this machine trains another, {_name(digest)}: judge it on the machine that began it"
        )
    with unless_refused():
        file.parent.mkdir(parents=True, exist_ok=True)
        if wrong:
            sound.aside(file, f"{wrong.why}, it is trained again")
        with files.by_rename(file) as temporary:  # every rank may be at it
            save_tensors(temporary, net.state_dict(), {sound.SUM: digest})
    return digest


def _digest(net: Classifier) -> str:
    digest = xxhash.xxh3_128()
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _name(digest: str) -> str:
    return f"classifier-64-32@{digest[:12]}"


def _known(cache: Path) -> set[str]:
    """The classifiers that what is kept of the run's real data says its figures are of."""
    names = set()
    for file in (cache / "reference").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.add(str(sound.read(file, key="own_xxh3_128")["key"]["extractor"]))
    return {name for name in names if name.startswith("classifier-64-32@")}
