"""Exported folders of every kind of network, with random weights, and what the trainer draws of them in plain torch.

By hand, in an environment with this project: `python -m tests.convert.folders OUT [RUN/STAGE ...]` writes them, and those of
stages that are trained. Then, where only torch and diffusers are installed: `python tests/convert/clean_export.py OUT`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from cmt_kernels import use
from safetensors.torch import save_file
from torch import Tensor

from cmt_fast import cli
from cmt_fast.config import fingerprint, loading
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.data.autoencoder import Codec
from cmt_fast.run import workspace
from cmt_fast.storage import checkpoint
from tests.fixtures import small, stores, synthetic

DIT = {"kind": "dit", "width": 16, "depth": 2, "heads": 2}
LIGHTNING = {"embeddings": "dit", "mlp": "swiglu", "norm": "rms", "rope": True, "qk_norm": True}
MLP = {"kind": "mlp", "width": 16, "depth": 2}
EDM = {"kind": "edm", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
NCSNPP = {**EDM, "preset": "cifar10-ncsnpp"}
ADM = {**EDM, "preset": "imagenet64", "width": 64}
N, SEED = 5, 3  # of the samples that are compared


class Case(NamedTuple):
    """model: of a recipe; steps: network calls; sampler, keys: of the recipe's sampler and stage; data: what it is of."""

    model: dict[str, Any]
    path: str = "ve"
    stage: str = "post"
    steps: tuple[int, ...] = (1, 2, 4)
    sampler: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    data: str = "pixels"


DROPPED = {"label_dropout": 0.1}
TOLD = {"objective": {"kind": "imeanflow", "omega_max": 8.0}, **DROPPED}
CASES = {
    "dit": Case(DIT),
    "dit-jumps": Case(DIT, "linear", steps=(1, 3)),
    "dit-latents": Case(DIT, data="latents"),
    "dit-ddpm": Case({**DIT, "embeddings": "dit", "precondition": "ddpm"}, "ve", "pre", (3, 6), {"order": 3}, DROPPED),
    "lightning": Case({**DIT, **LIGHTNING}, "linear", "pre", (2, 4), {"solver": "heun"}),
    "ditdh": Case(
        {**DIT, **LIGHTNING, "embeddings": "gaussian", "wide_head": {"width": 24, "depth": 1, "heads": 2}},
        "linear",
        "pre",
        (3,),
        {"solver": "euler", "shift": 2.0},
    ),
    "dit-told": Case(
        {**DIT, "guided": True, "velocity_head": 1},
        "linear",
        steps=(1, 2),
        sampler={"told_guidance": [3.0, 0.25, 0.75]},
        keys=TOLD,
    ),
    "mlp": Case(MLP, data="vectors"),
    "mlp-jumps": Case({**MLP, "velocity_head": 1}, "linear", data="vectors"),
    "edm2": Case(small.EDM2),
    "edm2-jumps": Case(small.EDM2, "linear"),
    "edm2-guided": Case(small.EDM2, "ve", "pre", (4,), {"guidance": 1.5}, DROPPED),
    "edm2-unlabelled": Case({**small.EDM2, "conditional": False}, "ve", "pre", (2,), {"solver": "heun"}),
    "edm": Case(EDM),
    "edm-flow": Case(EDM, "linear", "pre", (2,)),
    "ncsnpp": Case(NCSNPP, "linear", "post", (1,)),
    "adm": Case(ADM, "ve", "pre", (2,), {"solver": "euler"}),
}


def recipe(folder: Path, case: Case) -> Path:
    """The YAML file of a case. Of latents: their autoencoder is at `vae`."""
    file = small.recipe(folder, case.model, case.path, channels=3)
    tree = yaml.safe_load(file.read_text())
    tree["sampler"] |= case.sampler
    tree[case.stage] |= case.keys
    tree["eval"]["batch"], tree["sampler"]["teacher_steps"] = 64, 4
    if case.data == "vectors":
        tree["data"] = {"kind": "gmm", "n": 64}
    if case.data == "latents":
        synthetic.vae(folder / "vae", factor=2, width=8)
        made_by = ("some/vae", Codec.open(str(folder / "vae"), "cpu").digest)
        shape = (4, small.SIDE, small.SIDE)
        stores.make_store(folder / "store", n=20, shape=shape, classes=small.CLASSES, vae=made_by)
        tree["data"] = {"kind": "latents", "path": str(folder / "store")}
    file.write_text(yaml.safe_dump(tree))
    return file


def finished(folder: Path, case: Case) -> str:
    """RUN/STAGE of a run whose stage holds random weights, as if it had been trained."""
    run = loading.load(str(recipe(folder, case)))
    work = workspace.Workspace(run, folder / "run")
    work.claim()
    torch.manual_seed(1)
    spread = lambda t: (
        1.5 * t[0].numel() ** -0.5 if t.ndim > 1 else 0.3 if t.ndim else 1.0
    )  # of a layer's inputs, as trained
    weights = {k: torch.randn(t.shape) * spread(t) for k, t in work.build().state_dict().items()}
    digest = fingerprint.stage_digest(run, case.stage)
    about = {"stage": case.stage, "nimg": 8, "done": True, "recipe": run.name, "config": digest}
    checkpoint.save(
        folder / "run" / case.stage, 2, {"model": weights, "ema-0": weights}, about | {"parent": None, "wall": {}}
    )
    return str(folder / "run" / case.stage)


def exported(stage: str, folder: Path, steps: Iterable[int] | None = None) -> None:
    """folder/pipe as `cmt ckpt export` writes it, and folder/expected.safetensors: samples by number of steps, and images."""
    vae = folder / "vae"
    options = ["--vae", str(vae)] if vae.is_dir() else []
    assert cli.main(["ckpt", "export", stage, str(folder / "pipe"), "--format", "diffusers", *options]) == 0
    work, name = workspace.open_stage(stage)
    many = work.run.stages[name].objective.kind in DIFFUSION
    steps = steps or ((work.run.sampler.teacher_steps,) if many else (1, 2))
    with use("reference"):
        net = work.network(name)
        drawn = {str(k): work.setting.generate(net, k, N, SEED, many) for k in steps}
        codec = work.decoding.codec(str(vae)) if vae.is_dir() else None
        images = {f"images-{k}": codec.decode(x) / 2 + 0.5 for k, x in drawn.items()} if codec else {}
    tensors: dict[str, Tensor] = drawn | {k: x.clamp(0, 1).contiguous() for k, x in images.items()}
    save_file(
        tensors, folder / "expected.safetensors", {"threads": str(torch.get_num_threads())}
    )  # sums depend on them


def write(out: Path, stages: Iterable[str] = ()) -> None:
    """A folder for each case, and for each trained stage."""
    for name, case in CASES.items():
        (out / name).mkdir(parents=True)
        exported(finished(out / name, case), out / name, case.steps)
    for stage in stages:
        folder = out / "-".join(Path(stage).parts[-2:])
        folder.mkdir()
        exported(stage, folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
