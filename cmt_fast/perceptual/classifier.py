"""Training of the classifier whose features are the distance `latent_lpips`: SGD on labelled rows, cross-entropy.

    OUT/latent_vgg.safetensors    what `perceptual.weights` names, written at the end; its accuracy is in its header
    OUT/metrics.jsonl, checkpoints/    as of a stage; the same command goes on from the newest

Data parallel: every rank has the whole network, computes the gradient of its share of a step's rows, and takes the mean of all
of them, so the weights are those of one process up to the order of sums. Started again it ends with the same bits on a CPU with
as many processes; on CUDA the convolutions' gradients need not be repeatable. A checkpoint is written every epoch or so, after
SAVE_S seconds, and where a signal asks for the end. `features.precision: bf16` is autocast, as in a stage: weights and momenta
are fp32. Nothing is augmented. The optimizer's defaults are those that E-LatentLPIPS publishes for its classifier.

The accuracy is of images that were held out (`features.holdout`), in fp32, as the distance reads the network.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.renames import first_names
from cmt_fast.config.schema import Features, Run
from cmt_fast.data import held_out
from cmt_fast.data.loaders import loader
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.perceptual.distance import save_latent_network
from cmt_fast.runtime import distributed, exits, machine, progress, shared, signals
from cmt_fast.storage import checkpoint, files
from cmt_fast.storage.metrics_log import Log

FILE = "latent_vgg.safetensors"
SAVE_S = 1200.0  # seconds after which a checkpoint is written, as `checkpoint_every_s` of a stage
LOOK = 16  # steps after which ranks ask each other whether to save or to stop


class Plan(NamedTuple):
    """Lengths in steps. total; every: a row of metrics; save_every: a checkpoint, and the accuracy of what is held out."""

    total: int
    every: int
    save_every: int


def learning_rate(f: Features, epoch: int) -> float:
    """lr decay^floor(epoch / decay_every_epochs)."""
    return f.lr * f.decay ** (epoch // f.decay_every_epochs)


def plan(f: Features, n: int) -> Plan:
    """Of a training on n rows."""
    total = -(-f.epochs * n // f.batch)
    every = max(1, total // 50)
    return Plan(total, every, every * max(1, round(n / f.batch / every)))


class Trainer:
    """One classifier on its way. Every rank has one; all of them call every method, in step."""

    def __init__(self, run: Run, data: Any, held: Tensor, whole: Any, device: torch.device) -> None:
        """data: rows to train on; held: (m,) int64, rows of `whole` to measure the accuracy on."""
        f = self.f = run.features
        self.data, self.held, self.whole, self.device = data, held, whole, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.net = LatentVgg(data.shape[0], data.classes, f.width).to(device)
        self.sgd = torch.optim.SGD(self.net.parameters(), f.lr, f.momentum, weight_decay=f.weight_decay)
        self.rows = loader(run.loader, data, run.seed, device, f.batch)
        own = torch.arange(f.batch, device=self.rows.place)
        self.own = own[distributed.rank() :: distributed.size()]
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss and share right since the last row

    def step(self, n: int) -> None:
        """Step n, from 0."""
        f = self.f
        x, labels = self.rows.rows(self.own + n * f.batch)
        for group in self.sgd.param_groups:
            group["lr"] = learning_rate(f, n * f.batch // self.data.n)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=f.precision == "bf16"):
            logits = self.net(x)
        loss = F.cross_entropy(logits.float(), labels)
        self.sgd.zero_grad()
        loss.backward()
        self._mean_gradient()
        self.sgd.step()
        right = (logits.detach().argmax(1) == labels).double().mean()
        self.sums += torch.stack((loss.detach().double(), right))

    def _mean_gradient(self) -> None:
        """Gradients averaged over ranks, whose shares of a step are alike: one collective call a step."""
        if distributed.size() == 1:
            return
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = distributed.mean_(torch.cat([g.flatten() for g in gradients]))
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))

    def row(self, n: int, steps: int) -> dict[str, float]:
        """The means of the last `steps` steps over all ranks. Raises FloatingPointError, on all, for a loss that is none."""
        loss, accuracy = (distributed.mean_(self.sums) / steps).tolist()
        self.sums.zero_()
        if not abs(loss) < float("inf"):
            raise FloatingPointError(f"features: loss {loss} at step {n}; take a smaller features.lr")
        return {"loss": loss, "accuracy": accuracy, "lr": self.sgd.param_groups[0]["lr"]}

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Shares of what is held out whose label is the network's first guess, and among its first five; each rank its part."""
        mine = self.held[distributed.rank() :: distributed.size()]
        right = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in mine.split(self.f.batch):
            x, labels = (part.to(self.device) for part in self.whole.rows(index))
            guesses = self.net(x).topk(min(5, self.data.classes), dim=1).indices == labels[:, None]
            right += torch.stack((guesses[:, 0], guesses.any(1)), 1).double().sum(0)
        first, five = (distributed.sum_(right) / len(self.held)).tolist()
        return {"held_out": first, "held_out_top5": five}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a restart needs, file -> named tensors."""
        kept = {name: self.sgd.state[p].get("momentum_buffer") for name, p in self.net.named_parameters()}
        momenta = {name: m for name, m in kept.items() if m is not None}
        sums = distributed.mean_(self.sums.clone())  # a rank's own sums are lost, as its number of ranks may change
        return {"model": self.net.state_dict(), "optimizer": momenta, "sums": {"sums": sums}}

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint, which one rank reads for all. Versions that wrote no sums saved where they were 0."""
        self.net.load_state_dict(dict(shared.stream(found, "model").items()))
        momenta = dict(shared.stream(found, "optimizer").items())
        for name, p in self.net.named_parameters():
            if name in momenta:
                self.sgd.state[p]["momentum_buffer"] = momenta[name].to(p.device)
        if "sums.safetensors" in found.manifest["files"]:
            self.sums.copy_(shared.stream(found, "sums")["sums"])


def train(run: Run, data: Any, folder: Path, device: torch.device) -> Path:
    """Train on labelled images and write OUT/latent_vgg.safetensors; returns it. Goes on where a run of it stopped.

    Raises ConfigError for data without labels or too small, for a batch that ranks cannot share alike, and where the folder
    holds a run of other settings; Stopped where a signal asked for the end, with a checkpoint on disk.
    """
    _check(run.features, data)
    tree = loading.dump(run)
    facts = {key: tree[key] for key in ("data", "features", "seed")}
    found = _begun(folder, facts)
    with _opened(run, data, device) as trainer:
        if found:
            trainer.restore(found)
        distributed.agreed(lambda: None if distributed.rank() else folder.mkdir(parents=True, exist_ok=True))
        about = {"stage": "features", "facts": facts}
        accuracy = _steps(run, trainer, folder, found.manifest if found else {"step": 0, "wall": 0.0}, about)
    file = folder / FILE
    if distributed.rank() == 0:
        images = plan(run.features, trainer.data.n).total * run.features.batch
        more: dict[str, Any] = {"precision": run.features.precision} if run.features.precision != "fp32" else {}
        more |= {"accuracy": {"rows": len(trainer.held), **accuracy}} if accuracy else {}
        normalisation = getattr(data, "normalisation", None)
        about = {"nimg": images, "recipe": run.name, "normalisation": normalisation, **more}
        save_latent_network(trainer.net, file, about)
        progress.say(f"{file}: xxh3_128 {files.checksum(file)}; {_told(accuracy, len(trainer.held))}")
    return file


@contextlib.contextmanager
def _opened(run: Run, data: Any, device: torch.device) -> Iterator[Trainer]:
    """A trainer on what is not held out, in the stage's precision of products."""
    try:
        rest, held = held_out.split(data, run.features.holdout, run.seed)
    except ValueError as error:
        raise ConfigError(str(error), "features.holdout") from None
    trainer = Trainer(run, rest, held, data, device)
    with contextlib.closing(trainer.rows), machine.tf32(run.features.precision == "tf32"):
        yield trainer


def _told(accuracy: dict[str, float], rows: int) -> str:
    if not accuracy:
        return "features.holdout is 0: no row was held out to measure its accuracy on"
    return (
        f"{accuracy['held_out']:.2%} of {rows:,} held-out rows right, {accuracy['held_out_top5']:.2%} in five guesses"
    )


def _steps(run: Run, trainer: Trainer, folder: Path, begun: dict[str, Any], about: dict[str, Any]) -> dict[str, float]:
    """All steps after those of the manifest `begun`; returns the accuracy at the end, {} where nothing is held out.

    Raises Stopped where a signal asked for it.
    """
    f, writes = run.features, distributed.rank() == 0
    first, wall, accuracy = begun["step"], begun["wall"], begun.get("accuracy", {})
    total, every, save_every = plan(f, trainer.data.n)
    log, clock, saved = Log(folder, first, write=writes), time.perf_counter(), time.monotonic()
    with contextlib.ExitStack() as ending:
        shown = ending.enter_context(progress.Stage("features", first, total, f.batch, folder.parent))
        ending.callback(log.close)
        asked = ending.enter_context(signals.noted())
        for step in range(first, total):
            trainer.step(step)
            n, last = step + 1, step + 1 == total
            distributed.beat(n)
            if n % every == 0 or last:
                wall, clock = wall + time.perf_counter() - clock, time.perf_counter()
                row = trainer.row(n, n - (n - 1) // every * every)
                log.row("train", n, n * f.batch, row, {"train_s": wall})
                shown.saw(row["loss"])
            shown.step(n, lambda: None)
            whole = n % save_every == 0 or last
            if whole and len(trainer.held):
                accuracy = trainer.accuracy()
                log.row("held_out", n, n * f.batch, accuracy)
            stop, due = _agreed(n, asked, time.monotonic() - saved > SAVE_S)
            if whole or stop or due:
                wall, clock, saved = wall + time.perf_counter() - clock, time.perf_counter(), time.monotonic()
                manifest = {**about, "nimg": n * f.batch, "done": last, "wall": wall, "accuracy": accuracy}
                _save(folder, n, trainer.state(), manifest, log)
            if stop and not last:
                raise signals.Stopped(exits.SIGNAL + stop)
    return accuracy


def _agreed(n: int, asked: list[int], due: bool) -> tuple[int, bool]:
    """The signal that any rank was asked to stop by, 0 for none, and whether to save, after step n: the same on all ranks."""
    if distributed.size() > 1 and n % LOOK:
        return 0, False
    word = distributed.largest(2 * (asked[0] if asked else 0) + due)
    return word // 2, bool(word % 2)


def _save(folder: Path, n: int, state: dict[str, dict[str, Tensor]], manifest: dict[str, Any], log: Log) -> None:
    """The first rank writes; all raise where it cannot."""

    def write() -> None:
        if distributed.rank() == 0:
            log.commit()
            checkpoint.save(folder, n, state, manifest)

    distributed.agreed(write)


def _check(f: Features, data: Any) -> None:
    """Raises ConfigError for data that a classifier cannot be trained on, or a batch that ranks cannot share alike."""
    if not data.classes or len(data.shape) != 3 or min(data.shape[1:]) < 4:
        raise ConfigError(
            f"data: the classifier needs labelled images of 4 x 4 or more, the data has the shape {data.shape}"
        )
    size = distributed.size()
    if f.batch % size:
        raise ConfigError(
            f"{f.batch} rows cannot be shared alike by {size} processes; valid is a multiple of {size}, such as "
            f"{-(-f.batch // size) * size}",
            "features.batch",
        )


def _begun(folder: Path, facts: dict[str, Any]) -> checkpoint.Checkpoint | None:
    """The newest checkpoint in the folder, as the first rank finds it. Raises ConfigError where it is of other settings."""

    def look() -> bytes:
        found = checkpoint.latest(folder)
        return json.dumps(found and [found.folder.name, found.manifest]).encode()

    told = json.loads(distributed.from_first(look, checkpoint.CheckpointError))
    if told is None:
        return None
    found = checkpoint.Checkpoint(folder / "checkpoints" / told[0], told[1])
    now = json.loads(json.dumps(first_names(facts)))
    changed = fingerprint.changed(first_names(found.manifest["facts"]), now)
    if changed:
        raise ConfigError(f"--out: {folder} holds a classifier of other settings ({'; '.join(changed[:3])})")
    return found
