"""Weights under the names of other projects: read back they are the same network, and what has no name there is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmt_fast.convert import families, names, plain
from cmt_fast.run import workspace
from cmt_fast.storage import checkpoint
from tests.convert.test_import import cmt
from tests.fixtures import small

DDPM = {**small.SIT, "precondition": "ddpm"}
KINDS = {
    "edm2": (small.EDM2, "ve"),
    "dit": (DDPM, "ve"),
    "sit": (small.SIT, "linear"),
    "meanflow": (small.SIT, "linear"),
}


def stage(
    folder: Path, model: dict, path: str, name: str = "post", zero: set[str] | frozenset[str] = frozenset()
) -> Path:
    """A finished stage whose weights no training made: no gate is shut, and nothing is zero but `zero`."""
    from cmt_fast.config import fingerprint, loading

    folder.mkdir(exist_ok=True)
    run = loading.load(str(small.recipe(folder, model, path)))
    work = workspace.Workspace(run, folder / "run", reading=True)
    work.claim()
    torch.manual_seed(1)
    state = {
        k: v + torch.randn(v.shape) * 0.2 if v.is_floating_point() else v for k, v in work.build().state_dict().items()
    }
    state |= {k: torch.zeros_like(state[k]) for k in zero}
    about = {"stage": name, "nimg": 8, "done": True, "recipe": run.name, "parent": None, "wall": {}}
    about["config"] = fingerprint.stage_digest(run, name)
    checkpoint.save(folder / "run" / name, 2, {"model": state, "ema-0": state}, about)
    return folder / "run" / name


def outputs(of: Path, r: float | None = None) -> torch.Tensor:
    work, name = workspace.open_stage(str(of))
    dice = torch.Generator().manual_seed(3)
    x, t = torch.randn(3, 4, 8, 8, generator=dice), torch.tensor([0.3, 0.6, 0.9])
    return work.network(name)(x, t, t if r is None else torch.full((3,), r), torch.arange(3))


@pytest.mark.parametrize("suffix", plain.SUFFIXES)
@pytest.mark.parametrize("family", KINDS)
def test_what_goes_out_comes_in_as_the_same_network(family, suffix, tmp_path, capsys):
    model, path = KINDS[family]
    one_time = (
        {"net.duration.out.weight", "net.duration.out.bias"} if family == "sit" else set()
    )  # as an imported SiT's
    of = stage(tmp_path / "here", model, path, "post" if family != "sit" else "pre", one_time)
    out = tmp_path / f"out{suffix}"
    code, said, err = cmt(capsys, "ckpt", "export", of, out, "--format", family)
    assert code == 0 and "bit for bit" in said, err
    given = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    families.KNOWN[family].rename(given)  # knows every name
    if family == "edm2":
        assert given.keys() == small.edm2_names(checkpoint.complete(of).tensors("ema-0")).keys()
    elif family != "meanflow":
        assert given.keys() == small.sit_state().keys()
        assert all(v.shape == given[k].shape for k, v in small.sit_state().items())
    again = ["--recipe", tmp_path / "here/small.yaml", "--out", tmp_path / "again"]
    code, _, err = cmt(capsys, "ckpt", "import", out, *again, *(["--as", family] if family in ("dit", "sit") else []))
    assert code == 0, err
    assert torch.equal(outputs(tmp_path / "again/pre"), outputs(of))
    if family == "meanflow":
        assert torch.equal(outputs(tmp_path / "again/pre", 0.1), outputs(of, 0.1))


def test_a_constant_of_the_other_time_goes_into_the_bias(tmp_path, capsys):
    """A flow matching stage trains its embedding of t - r at 0 alone."""
    of = stage(tmp_path / "here", small.SIT, "linear", "pre")
    code, said, _ = cmt(capsys, "ckpt", "export", of, tmp_path / "out.pt", "--format", "sit")
    assert code == 0 and "the constant of its embedding of t - r went into a bias" in said
    again = ["--recipe", tmp_path / "here/small.yaml", "--out", tmp_path / "again", "--as", "sit"]
    assert cmt(capsys, "ckpt", "import", tmp_path / "out.pt", *again)[0] == 0
    torch.testing.assert_close(outputs(tmp_path / "again/pre"), outputs(of))


@pytest.mark.parametrize(
    "model, path, family, said",
    [
        (small.SIT, "linear", "sit", "net.duration.out.weight, of the embedding of t - r, has no place in sit"),
        (small.SIT, "linear", "dit", "this run's network is dit on linear; there is sit or meanflow"),
        (small.SIT, "ve", "dit", "dit has model.precondition 'ddpm', this run's is 'edm'"),
        ({**small.SIT, "embeddings": "cmt"}, "linear", "meanflow", "meanflow has model.embeddings 'dit', this run's is 'cmt'"),
        ({**small.SIT, "rope": True}, "linear", "meanflow", "meanflow has model.rope False, this run's is True"),
        (small.EDM2, "linear", "edm2", "this run's network is edm2 on linear; safetensors and onnx take any"),
    ],
)  # fmt: skip
def test_what_has_no_place_there_is_named(model, path, family, said, tmp_path, capsys):
    of = stage(tmp_path / "here", model, path)
    code, _, err = cmt(capsys, "ckpt", "export", of, tmp_path / "out.pt", "--format", family)
    assert code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "out.pt").exists()


def test_a_log_variance_stays_here_and_begins_anew(tmp_path, capsys):
    """It weighs a loss, and DiT has no place for one: the file is the same network, and one that comes in begins at weight 1."""
    of = stage(tmp_path / "here", {**DDPM, "log_variance": True}, "ve")
    out, again = tmp_path / "out.safetensors", tmp_path / "again"
    assert cmt(capsys, "ckpt", "export", of, out, "--format", "dit")[0] == 0
    code, said, err = cmt(
        capsys, "ckpt", "import", out, "--recipe", tmp_path / "here/small.yaml", "--out", again, "--as", "dit"
    )
    assert code == 0 and "0 missing" in said and "the log variance, which the file has not, begins at 0" in said, err
    assert torch.equal(outputs(again / "pre"), outputs(of))
    given, came = (checkpoint.complete(x).tensors("ema-0") for x in (of, again / "pre"))
    head = [name for name in given if name.startswith("net.log_variance.")]
    assert given.keys() == came.keys() and len(head) == 2
    assert all(given[name].any() and not came[name].any() for name in head)
    own = tmp_path / "own.safetensors"  # our own format takes all of it, to a recipe with the head and to one without
    assert cmt(capsys, "ckpt", "export", of, own)[0] == 0
    for key, there in (("true", True), ("false", False)):
        arguments = ("--recipe", tmp_path / "here/small.yaml", "--out", tmp_path / key, f"model.log_variance={key}")
        code, _, err = cmt(capsys, "ckpt", "import", own, *arguments)
        assert code == 0, err
        found = checkpoint.complete(tmp_path / key / "pre").tensors("ema-0")
        assert all(torch.equal(found[name], given[name]) for name in found) and (set(head) <= found.keys()) == there


def test_a_map_that_loses_a_number_is_found(tmp_path, capsys, monkeypatch):
    of = stage(tmp_path / "here", DDPM, "ve")
    wrong = plain.TARGETS["dit"]._replace(
        names=lambda export, ours: {k: v * (1 + 1e-6 * ("fc2" in k)) for k, v in plain.dit(export, ours).items()}
    )
    monkeypatch.setitem(plain.TARGETS, "dit", wrong)
    code, _, err = cmt(capsys, "ckpt", "export", of, tmp_path / "out.pt", "--format", "dit")
    assert code == 2 and "net.blocks.0.fc2" in err and not (tmp_path / "out.pt").exists()
    code, _, err = cmt(capsys, "ckpt", "export", of, tmp_path / "out.bin", "--format", "dit")
    assert code == 2 and "does not end in .safetensors or .pt" in err


def test_time_turned_twice_is_time():
    state = small.sit_state()
    state["t_embedder.mlp.0.weight"] = state["t_embedder.mlp.0.weight"].double()
    once = names.reversed_time(state)
    assert not torch.allclose(once["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.weight"])
    assert all(torch.equal(v.float(), state[k].float()) for k, v in names.reversed_time(once).items())
