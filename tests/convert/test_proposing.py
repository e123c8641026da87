"""`cmt recipes ls --weights FILE`: commands that import the file, for small files of every family and shapes of the published."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cmt_fast import cli, models
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Edm2
from cmt_fast.convert import files, proposing
from cmt_fast.models import dit
from cmt_fast.models.weightless import weightless
from cmt_fast.storage import checkpoint
from tests.cost.test_published import CASES, weights
from tests.fixtures import pickled, small

BUFFERS = ("freqs", "phases", "resample_filter")
ARGUMENTS = {  # what the published pickles keep of EDM's and EDM2's small networks
    "edm2": {"img_resolution": 8, "img_channels": 4, "label_dim": 5, "channels_per_head": 8, "sigma_data": 0.5},
    "edm2-unconditional": {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "channels_per_head": 8},
}


def proposed(capsys, *arguments) -> list[list[str]]:
    """The commands that are printed, as words."""
    code = cli.main(["recipes", "ls", "--weights", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return [shlex.split(line)[1:] for line in said.out.splitlines() if line.startswith("cmt ")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_what_is_proposed_is_imported(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state, chosen = weights(case), []
    if case["id"] in ARGUMENTS:
        net = pickled.tree(state, BUFFERS, **ARGUMENTS[case["id"]])
        Path("net").write_bytes(pickled.dumps({"ema": net}))
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, "net")
        chosen = ["--as", case["family"]] if case["family"] in ("dit", "sit") else []
    commands = proposed(capsys, "net", *chosen)
    assert commands
    words = [w.replace("HEADS", str(case["model"].get("heads"))) for w in commands[0]]
    assert cli.main(words) == 0, capsys.readouterr().err
    built = checkpoint.complete(Path(words[-1]) / "pre").tensors("ema-0")
    overrides = [w for w in words[words.index("--recipe") + 2 :] if "=" in w]
    model = loading.load(words[words.index("--recipe") + 1], overrides).model
    for key, value in case["model"].items():  # the network is the case's own
        given = getattr(model, key)
        given = vars(given) if isinstance(value, dict) else given
        assert key in ("size", "preset") or given in (value, tuple(value) if isinstance(value, list) else value), key
    kept = {
        k
        for k in state
        if k != "pos_embed" and not k.startswith("projectors") and "feat_rope" not in k and "resample" not in k
    }
    durations = {"ditdh": 5}.get(case["id"], 4 * (case["family"] in ("sit", "repa", "lightningdit")))  # of one time
    assert len(built) == len(kept) + durations


# ---------------------------------------------------------------------------------------------- the published sizes


def transformer(size: str, side: int, patch: int, sigma: int = 2) -> dict[str, torch.Tensor]:
    """Names and shapes of DiT's and SiT's state dicts for 4 channels and 1000 classes, without memory."""
    width, depth, _ = dit.SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (side // patch) ** 2, width),
        "x_embedder.proj.weight": (width, 4, patch, patch),
        "y_embedder.embedding_table.weight": (1001, width),
    }
    layers = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    layers |= {
        "final_layer.linear": (patch**2 * 4 * sigma, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        layers |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
        layers |= {f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()} | {"x_embedder.proj.bias": (width,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def held(state: dict, **about) -> files.Source:
    return files.Source(Path("net.pt"), "torch", "", ("",), state, about, ())


@pytest.mark.parametrize(
    "family, size, side, patch, first",
    [
        ("sit", "XL", 64, 2, ("imagenet512-dit", ("model.embeddings=dit",))),
        ("sit", "XL", 32, 2, ("imagenet256-mf-teacher", ("model.size=XL", "model.patch=2"))),
        ("sit", "B", 32, 4, ("imagenet256-mf-teacher", ())),
        ("dit", "XL", 32, 2, ("imagenet64-ect", None)),
        ("dit", "XL", 64, 2, ("imagenet64-ect", None)),
    ],
)
def test_published_transformers(family, size, side, patch, first):
    """SiT-XL/2 at 512 and 256 pixels, DiT-XL/2 likewise; without a byte of memory for either network."""
    told, found = proposing.propose(held(transformer(size, side, patch)), family)
    assert told == family
    name, overrides = first
    assert (found[0].recipe, found[0].overrides if overrides is not None else None) == (name, overrides)
    run = loading.load(name, found[0].overrides)
    shape = (4, side, side)
    assert run.data.expects.shape == shape and run.model.precondition == ("ddpm" if family == "dit" else "edm")
    assert (run.data.scale, run.data.mean) == (0.18215, (0, 0, 0, 0))


@pytest.mark.parametrize(
    "size, shape, recipe",
    [
        ("M", (4, 64, 64), "imagenet512-ecd"),
        ("S", (3, 64, 64), "imagenet64-ecd"),
    ],
)
def test_published_edm2(size, shape, recipe):
    with weightless():
        state = models.build(Edm2(size=size), "ve", 0.5, shape, 1000).state_dict()
    told = {"img_resolution": 64, "img_channels": shape[0], "label_dim": 1000, "sigma_data": 0.5}
    affine = {"scale": [0.5 / s for s in (4.17, 4.62, 3.71, 3.28)], "bias": [-0.5 * m / s for m, s in
              zip((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))]}  # fmt: skip
    encoder = {"state": affine} if shape[0] == 4 else None
    source = held(small.edm2_names(state, 64), init_kwargs=told, encoder=encoder)
    family, found = proposing.propose(source)
    overrides = () if loading.load(recipe).model.size == size else (f"model.size={size}",)
    assert family == "edm2" and (found[0].recipe, found[0].overrides) == (recipe, overrides)


def test_what_fits_nothing_names_the_nearest(tmp_path):
    state = transformer("S", 32, 2)
    state.pop("blocks.3.mlp.fc1.weight")
    with pytest.raises(
        ConfigError, match=r"fits no packaged recipe; nearest is imagenet.* net.blocks.3.fc1.weight"
    ) as caught:
        proposing.propose(held(state), "sit")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="could be dit or sit"):
        proposing.propose(held(state))


@pytest.mark.parametrize("words", [("show", "digits", "--weights", "x"), ("ls", "--as", "sit"), ("ls", "--ema", "ema")])
def test_arguments_that_belong_to_weights(words, capsys):
    assert cli.main(["recipes", *words]) == 2
    assert "is for cmt recipes ls --weights FILE" in capsys.readouterr().err
