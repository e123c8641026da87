"""Exported folders of every kind of network, with random weights, and the samples that the trainer draws of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from cmt_kernels import use

from cmt_fast import cli
from cmt_fast.config import fingerprint, loading
from cmt_fast.run import workspace
from cmt_fast.storage import checkpoint
from tests.fixtures import small

DIT = {"kind": "dit", "width": 16, "depth": 2, "heads": 2}
LIGHTNING = {"embeddings": "dit", "mlp": "swiglu", "norm": "rms", "rope": True, "qk_norm": True}
EDM = {"kind": "edm", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
ADM = {**EDM, "preset": "imagenet64", "width": 64, "attention": [4]}


class Case(NamedTuple):
    """model: of a recipe; sampler and stage: keys of the recipe; steps: how often the network may be called."""

    model: dict[str, Any]
    path: str = "ve"
    stage: str = "post"
    steps: tuple[int, ...] = (1, 2, 4)
    sampler: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    vector: bool = False


CASES = {
    "dit": Case(DIT),
    "dit-mf": Case(DIT, "linear", steps=(1, 3)),
    "lightning-flow": Case({**DIT, **LIGHTNING}, "linear", "pre", (2, 4), {"solver": "heun"}),
    "dit-ddpm": Case(
        {**DIT, "embeddings": "dit", "precondition": "ddpm"}, "ve", "pre", (3, 6), {"order": 3}, {"label_dropout": 0.1}
    ),
    "mlp": Case({"kind": "mlp", "width": 16, "depth": 2}, vector=True),
    "mlp-mf": Case({"kind": "mlp", "width": 16, "depth": 2}, "linear", vector=True),
    "edm2": Case(small.EDM2),
    "edm2-mf": Case(small.EDM2, "linear"),
    "edm2-diffusion": Case(small.EDM2, "ve", "pre", (4,), {"guidance": 1.5}, {"label_dropout": 0.1}),
    "edm2-unlabelled": Case({**small.EDM2, "conditional": False}, "ve", "pre", (2,), {"solver": "heun"}),
    "edm": Case(EDM),
    "edm-mf": Case(EDM, "linear", "pre", (2,)),
    "adm": Case(ADM, "ve", "pre", (2,), {"solver": "euler"}),
}


def run(folder: Path, case: Case, channels: int = 3) -> Path:
    """The recipe's file of a case, over random images or vectors."""
    recipe = small.recipe(folder, case.model, case.path, channels)
    tree = yaml.safe_load(recipe.read_text())
    tree["sampler"] |= case.sampler
    tree[case.stage] |= case.keys
    tree["eval"]["batch"] = 64
    if case.vector:
        tree["data"] = {"kind": "gmm", "n": 64}
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def finished(folder: Path, case: Case, channels: int = 3) -> str:
    """RUN/STAGE of a run whose stage holds random weights, as if it had been trained."""
    config = loading.load(str(run(folder, case, channels)))
    work = workspace.Workspace(config, folder / "run")
    work.claim()
    torch.manual_seed(1)
    fresh = work.build().state_dict()
    weights = {k: torch.randn(t.shape) * (0.3 if t.ndim else 1.0) for k, t in fresh.items()}
    stage = case.stage
    digest = fingerprint.stage_digest(config, stage)
    about = {
        "stage": stage,
        "nimg": 8,
        "done": True,
        "recipe": config.name,
        "config": digest,
        "parent": None,
        "wall": {},
    }
    checkpoint.save(folder / "run" / stage, 2, {"model": weights, "ema-0": weights}, about)
    return str(folder / "run" / stage)


def exported(folder: Path, case: Case, *options: str) -> Path:
    """The folder that `cmt ckpt export` writes of it."""
    out = folder / "pipe"
    assert cli.main(["ckpt", "export", finished(folder, case), str(out), "--format", "diffusers", *options]) == 0
    return out


def expected(folder: Path, case: Case, n: int = 5, seed: int = 3) -> dict[int, torch.Tensor]:
    """What the trainer draws in plain torch, by number of steps."""
    work, stage = workspace.open_stage(str(folder / "run" / case.stage))
    with use("reference"):
        net = work.network(stage)
        return {k: work.setting.generate(net, k, n, seed, case.stage == "pre") for k in case.steps}
