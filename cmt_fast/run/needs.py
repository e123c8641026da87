"""What a run needs from outside itself, all of it at once: data, networks, weights, statistics, packages; and how each is got.

One list serves `cmt train`, which refuses to begin while something is missing, and `cmt recipes`, which tells it beforehand.
Only whether things are there is looked at; whether they fit is said by who reads them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cmt_fast.config import recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run, Stage
from cmt_fast.run import folder as folder_
from cmt_fast.storage import checkpoint
from cmt_fast.storage.loggers import EXTRAS

VAE = "stabilityai/sd-vae-ft-mse"  # the autoencoder of DiT, SiT, REPA, MeanFlow and EDM2
RAE = "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"  # that of DiT^DH, for 16 x 16 latents; with -i512 for 32 x 32
REPRESENTATION = 256  # channels from which on latents are taken for features of an encoder, as RAE's


class Need(NamedTuple):
    """key: of the recipe that names it; what: the path or package as it stands there; here: whether it is on this machine;
    wrong: what is said of it where it is not; how: a command or a public file that makes it so.
    """

    key: str
    what: str
    here: bool
    wrong: str
    how: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what!r} {self.wrong}" + f"; {self.how}" * bool(self.how)


def missing(run: Run, folder: Path, parents: Path | None, stages: Sequence[str]) -> list[Need]:
    """What is not here to train these stages; arguments as of `needs`."""
    return [n for n in needs(run, folder, parents, stages) if not n.here]


def error(missing: Sequence[Need]) -> ConfigError:
    """One line of everything that is missing."""
    if len(missing) == 1:
        return ConfigError(str(missing[0]))
    return ConfigError(f"{len(missing)} things are missing: {' | '.join(map(str, missing))}")


def needs(run: Run, folder: Path, parents: Path | None = None, stages: Sequence[str] | None = None) -> list[Need]:
    """What these stages of a run need, in the order in which they would miss it.

    folder, parents: where its own stages are; stages: those that are trained, None for all that are not imported as a rule.
    """
    imports = _imports(run)
    trained = [s for s in run.stages if s != "pre" or not imports] if stages is None else list(stages)
    found = [*_data(run), *_packages(run)]
    for i, name in enumerate(trained):
        found += _networks(run, name, folder, parents, trained[:i], imports)
        found += _files(run, name, run.stages[name])
    found += _judge(run)
    return list(dict.fromkeys(found))


def _data(run: Run) -> Iterator[Need]:
    path = getattr(run.data, "path", None)
    if path is None:
        return
    if run.data.kind == "npz":
        yield Need("data.path", path, os.path.isfile(path), "does not exist", "")
        return
    expects = getattr(run.data, "expects", None)
    how = f"make it by `cmt data encode IMAGES {path}`, or `cmt data import` an archive of another project"
    if expects:
        channels, side, _ = expects.shape
        size = f"--size {side} --pixels" if channels in (1, 3) else f"--vae {VAE} --size {8 * side}"
        if _features(run):
            size = f"--vae {RAE}{'-i512' if side == 32 else ''} --size {16 * side}" + " --flip" * getattr(
                run.data, "flip", False
            )
        forms = "edm" if channels in (1, 3) else "edm2, lightningdit or npy"
        how = f"make it by `cmt data encode IMAGES {path} {size}`, or `cmt data import` with --format {forms}"
    yield Need("data.path", path, os.path.isdir(path), "is not a folder", how)


def _packages(run: Run) -> Iterator[Need]:
    wanted = [("engine", "deepspeed", "zero")] if run.engine == "zero" else []
    wanted += [("loader.kind", "nvidia.dali", "dali")] if run.loader.kind == "dali" else []
    wanted += [("data.kind", "sklearn", "demo")] if run.data.kind in ("digits", "photos") else []
    wanted += [("data.kind", "skimage", "demo")] if run.data.kind == "photos" else []
    wanted += [("eval.metric", "torch_fidelity", "eval")] if run.eval.metric == "fid" else []
    wanted += [("eval.vae", "diffusers", "latents")] if _decodes(run) else []
    wanted += [("eval.vae", "transformers", "transformers")] if _decodes(run) and _features(run) else []
    wanted += [("loggers", name, EXTRAS[name]) for name in run.logging]
    for key, package, extra in wanted:
        how = (
            "pip install transformers" if extra == "transformers" else f"pip install 'cmt-fast[{extra}]'"
        ) + ", or nvidia-dali-cuda120 beside a torch for CUDA 12" * (extra == "dali")
        yield Need(key, package, installed(package), "is not installed", how)


def installed(module: str) -> bool:
    """Whether it could be imported. Packages of CUDA make the `nvidia` of `nvidia.dali`; without any the question is an error."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _decodes(run: Run) -> bool:
    """Whether latents are decoded to be judged, as far as the recipe says what its rows are."""
    expects = getattr(run.data, "expects", None)
    return run.eval.metric != "frechet" and expects is not None and expects.shape[0] not in (1, 3)


def _features(run: Run) -> bool:
    """Whether latents are an encoder's features, as RAE's, as far as the recipe says what its rows are."""
    expects = getattr(run.data, "expects", None)
    return expects is not None and expects.shape[0] >= REPRESENTATION


def _networks(
    run: Run, name: str, folder: Path, parents: Path | None, before: Sequence[str], imports: str
) -> Iterator[Need]:
    """The stages that a stage starts from or is taught by, and that are not trained before it."""
    stage = run.stages[name]
    cached = stage.trajectories.cache if stage.trajectories else None
    for key, other in stage.networks().items():
        if "/" in other:
            run_, _, last = other.rpartition("/")
            at = folder_.located(run_, folder)
            train = f"`cmt train {Path(run_).name} --stages {last} --out {run_}`, or " * (
                Path(run_).name in recipes.recipes()
            )
            begun = folder_.is_run(at)
            how = (
                "train it first"
                if begun
                else f"{train}`cmt ckpt import FILE --recipe RECIPE --out {run_}` a public network"
            )
            wrong = "has no checkpoint" if begun else "is no run"
            if not begun and folder_.is_run(folder):
                near = dict.fromkeys(p for p in (Path(run_), folder_.beside(run_, folder)) if folder_.is_run(p))
                said = " and ".join(repr(str(p)) for p in near)
                wrong += f", and {said} {'are' if len(near) > 1 else 'is'} not known to be it" if near else ""
                how = f"{name}.{key}=RUN/{last} says where it is now; or {how}"
            there = bool(checkpoint.steps(at / last)) or (bool(cached) and key != "start")
            yield Need(f"{name}.{key}", other, there, wrong, how)
        elif other in list(run.stages)[: list(run.stages).index(name)] and other not in before:
            places = [p / other for p in (folder, parents) if p]
            how = f"train it first, or {imports}" if imports else "train it first"
            there = any(checkpoint.steps(p) for p in places)
            yield Need(other, str(places[-1]), there, "has no checkpoint", how)


def _files(run: Run, name: str, stage: Stage) -> Iterator[Need]:
    where = f"{name}.perceptual"
    if stage.perceptual:
        latent = "latent_lpips" in stage.distances()
        out = Path(stage.perceptual.weights).parent
        how = (
            f"`cmt train-features {run.name} --out {out}`"
            if latent
            else "VGG16 of torchvision (vgg16-397923af.pth) with LPIPS' heads (vgg.pth of the lpips package), in one file or two"
        )
        for key in ("weights", "heads"):
            path = getattr(stage.perceptual, key)
            if path:
                yield Need(f"{where}.{key}", path, os.path.isfile(path), "does not exist", how)
    if stage.trajectories and stage.trajectories.cache:
        path = stage.trajectories.cache
        how = f"`cmt trajectories {run.name} --stage {name} --cache {path} -n N`"
        yield Need(f"{name}.trajectories.cache", path, os.path.isdir(path), "is not a folder", how)


def _judge(run: Run) -> Iterator[Need]:
    e = run.eval
    free = "or judge by eval.metric=frechet eval.reference=null eval.weights=null"
    if e.weights or e.metric != "frechet":
        from cmt_fast.evaluation.inception import URL  # which comes with torch; lists of runs do without

        url = URL if e.metric == "fid" else "DINOv2 ViT-L/14 of facebookresearch"
        wrong = "is no file" if e.weights else f"is missing, {e.metric} needs the file of its extractor's weights"
        there = bool(e.weights) and os.path.isfile(str(e.weights))
        yield Need("eval.weights", str(e.weights), there, wrong, f"fetch it from {url}, {free}")
    if e.reference or e.metric != "frechet":
        own = f"`cmt eval {run.name} --metric {e.metric} --weights {e.weights} --make-reference FILE.npz`"
        how = f"public statistics (of EDM, EDM2 or ADM) or your own by {own}, {free}"
        wrong = "is no file" if e.reference else f"is missing, {e.metric} compares with a file of statistics"
        there = bool(e.reference) and os.path.isfile(str(e.reference))
        yield Need("eval.reference", str(e.reference), there, wrong, how)
    if _decodes(run) and not e.vae and not os.path.isdir(getattr(run.data, "path", "")):
        known = RAE if _features(run) else VAE
        yield Need("eval.vae", known, False, "is not known to be here", "the store names the autoencoder that made it")
    if e.vae and e.vae.startswith(("/", "./", "../")):
        yield Need("eval.vae", e.vae, os.path.isdir(e.vae), "is not a folder", f"a diffusers autoencoder, as {VAE}")


def _imports(run: Run) -> str:
    """The import of the public network that stands in a recipe's header, as a command; "" where there is none."""
    if run.name not in recipes.recipes():
        return ""
    header = " ".join(line.lstrip("# ") for line in recipes.recipe_text(run.name).splitlines() if line[:1] == "#")
    found = re.search(r"cmt ckpt import \S+ --recipe \S+( \w+(\.\w+)+=\S+)* --out \S+[^\s;,.]", header)
    return f"`{found[0]}`" if found else ""


def listed(run: Run, folder: Path | None = None) -> tuple[list[str], list[str]]:
    """What is missing on this machine and what is there, a line each."""
    found = needs(run, folder or folder_.default(run))
    return [str(n) for n in found if not n.here], [f"{n.key}: {n.what}" for n in found if n.here]
