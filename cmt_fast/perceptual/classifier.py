"""Training of the classifier whose features are the distance `latent_lpips`: SGD on labelled rows, cross-entropy.

    OUT/latent_vgg.safetensors    what `perceptual.weights` names, written at the end
    OUT/metrics.jsonl, checkpoints/    as of a stage, one an epoch; the same command goes on from the newest

Stopped and started again it ends with the same bits on a CPU; on CUDA the convolutions' gradients need not be repeatable.
One process, fp32, no augmentation of its own: E-LatentLPIPS' published settings are the defaults of the recipe's `features`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Features, Run
from cmt_fast.data.loaders import loader
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.perceptual.distance import save_latent_network
from cmt_fast.runtime import distributed, progress
from cmt_fast.storage import checkpoint, files
from cmt_fast.storage.metrics_log import Log

FILE = "latent_vgg.safetensors"


def learning_rate(f: Features, epoch: int) -> float:
    """lr decay^floor(epoch / decay_every_epochs)."""
    return f.lr * f.decay ** (epoch // f.decay_every_epochs)


def train(run: Run, data, folder: Path, device: torch.device) -> Path:
    """Train on labelled images and write OUT/latent_vgg.safetensors; returns it. Goes on where a run of it stopped.

    Raises ConfigError for data without labels or too small, and where the folder holds a run of other settings.
    """
    f = run.features
    _check(data)
    tree = loading.dump(run)
    facts = {key: tree[key] for key in ("data", "features", "seed")}
    rows = loader(run.loader, data, run.seed, device, f.batch)
    total = -(-f.epochs * data.n // f.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = LatentVgg(data.shape[0], data.classes, f.width).to(device)
    sgd = torch.optim.SGD(net.parameters(), f.lr, f.momentum, weight_decay=f.weight_decay)
    found, wall = _begun(folder, facts), 0.0
    if found:
        _restore(net, sgd, found)
        wall = found.manifest["wall"]
    first = found.manifest["step"] if found else 0
    folder.mkdir(parents=True, exist_ok=True)
    every = max(1, total // 50)
    save_every = every * max(1, round(data.n / f.batch / every))
    log, sums = Log(folder, first, write=True), torch.zeros(2, dtype=torch.float64, device=device)
    clock = time.perf_counter()
    with contextlib.ExitStack() as ending, progress.Stage("features", first, total, f.batch, folder.parent) as shown:
        for part in (rows, log):
            ending.callback(part.close)
        for step in range(first, total):
            x, labels = rows.rows(torch.arange(f.batch, device=rows.place) + step * f.batch)
            for group in sgd.param_groups:
                group["lr"] = learning_rate(f, step * f.batch // data.n)
            logits = net(x)
            loss = F.cross_entropy(logits, labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            right = (logits.detach().argmax(1) == labels).double().mean()
            sums += torch.stack((loss.detach().double(), right))
            n, last = step + 1, step + 1 == total
            if n % every == 0 or last:
                wall, clock = wall + time.perf_counter() - clock, time.perf_counter()
                mean, accuracy = (sums / (n - (n - 1) // every * every)).tolist()
                sums.zero_()
                if not abs(mean) < float("inf"):
                    raise FloatingPointError(f"features: loss {mean} at step {n}; take a smaller features.lr")
                row = {"loss": mean, "accuracy": accuracy, "lr": sgd.param_groups[0]["lr"]}
                log.row("train", n, n * f.batch, row, {"train_s": wall})
                shown.saw(mean)
            shown.step(n, lambda: None)
            if n % save_every == 0 or last:
                log.commit()
                about = {"stage": "features", "nimg": n * f.batch, "done": last, "facts": facts, "wall": wall}
                checkpoint.save(folder, n, _state(net, sgd), about)
    file = folder / FILE
    save_latent_network(
        net, file, {"nimg": total * f.batch, "recipe": run.name, "normalisation": getattr(data, "normalisation", None)}
    )
    progress.say(f"{file}: xxh3_128 {files.checksum(file)}")
    return file


def _check(data) -> None:
    """Raises ConfigError for data that a classifier cannot be trained on, or with more than one process."""
    if not data.classes or len(data.shape) != 3 or min(data.shape[1:]) < 4:
        raise ConfigError(
            f"data: the classifier needs labelled images of 4 x 4 or more, the data has the shape {data.shape}"
        )
    if distributed.size() > 1:
        raise ConfigError(f"cmt train-features: is one process, {distributed.size()} were started")


def _begun(folder: Path, facts: dict) -> checkpoint.Checkpoint | None:
    """The newest checkpoint in the folder. Raises ConfigError where it is of other settings."""
    found = checkpoint.latest(folder)
    changed = fingerprint.changed(found.manifest["facts"], facts) if found else []
    if changed:
        raise ConfigError(f"--out: {folder} holds a classifier of other settings ({'; '.join(changed[:3])})")
    return found


def _state(net: LatentVgg, sgd: torch.optim.SGD) -> dict[str, dict[str, Tensor]]:
    kept = {name: sgd.state[p].get("momentum_buffer") for name, p in net.named_parameters()}
    return {"model": net.state_dict(), "optimizer": {name: m for name, m in kept.items() if m is not None}}


def _restore(net: LatentVgg, sgd: torch.optim.SGD, found: checkpoint.Checkpoint) -> None:
    net.load_state_dict(found.tensors("model"))
    momenta = found.tensors("optimizer")
    for name, p in net.named_parameters():
        if name in momenta:
            sgd.state[p]["momentum_buffer"] = momenta[name].to(p.device)
