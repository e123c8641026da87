"""`.pt` and safetensors files: which network is read, and that nothing in a hostile one runs."""

from __future__ import annotations

import argparse
import warnings

import pytest
import torch
from safetensors.torch import save_file

from cmt_fast.config.errors import ConfigError
from cmt_fast.convert import files
from tests.fixtures import archives, pickled


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 4, generator=random), "b": torch.randn(5, generator=random).half()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("old", [False, True])
def test_the_ema_of_a_training_script_is_taken_and_its_arguments_are_kept(tmp_path, old):
    args = argparse.Namespace(model="SiT-S/2", path_type="Linear", image_size=64, root="/x")
    moments = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]}
    tree = {
        "model": {f"module.{k}": v for k, v in state(1).items()},
        "ema": state(0),
        "opt": optimizer,
        "args": args,
        "steps": 7,
    }
    path = tmp_path / "0000007.pt"
    torch.save(tree, path, _use_new_zipfile_serialization=not old)
    found = files.read(path)
    assert (found.kind, found.entry, found.entries) == ("torch", "ema", ("model", "ema")) and same(
        found.tensors, state(0)
    )
    assert found.about["args"] == vars(args) and found.sha256 == files.sha256(path) and not found.notes
    found = files.read(path, "model")
    assert same(found.tensors, state(1)) and "'module.'" in found.notes[0]
    with pytest.raises(ConfigError, match="--ema: 'emo' is not in the file; it has model, ema; did you mean ema"):
        files.read(path, "emo")


def test_bare_state_dicts_and_safetensors(tmp_path):
    torch.save(state(), tmp_path / "bare.pt")
    save_file(state(), tmp_path / "bare.safetensors", {"format": "pt"})
    for name, kind in (("bare.pt", "torch"), ("bare.safetensors", "safetensors")):
        found = files.read(tmp_path / name)
        assert same(found.tensors, state()) and (found.kind, found.entry) == (kind, "")
    torch.save({"first": state(), "second": state(1)}, tmp_path / "two.pt")
    with pytest.raises(ConfigError, match="--ema: is missing; the file has first, second"):
        files.read(tmp_path / "two.pt")


def test_pickled_networks(tmp_path):
    net = pickled.network(tmp_path / "net.pkl")
    found = files.read(tmp_path / "net.pkl")
    assert (found.kind, found.entry, found.about["class"]) == ("pickle", "ema", "Precond")
    assert same(found.tensors, net.state_dict()) and found.about["encoder"]["state"]["vae_name"] == "some/vae"
    (tmp_path / "bare.pkl").write_bytes(pickled.dumps(net))
    assert same(files.read(tmp_path / "bare.pkl").tensors, net.state_dict())


def test_hostile_files_run_nothing_and_are_refused_in_one_line(tmp_path, capfd):
    cases = archives.cases(str(tmp_path / "canary"))
    assert len(cases) > 40
    path = tmp_path / "case"
    for name, body in cases.items():
        path.write_bytes(body)
        with pytest.raises(ConfigError) as caught:
            files.read(path)
            pytest.fail(f"{name} was read")
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 500, name
        assert not (tmp_path / "canary").exists(), name
    assert [p.name for p in tmp_path.iterdir()] == ["case"] and capfd.readouterr() == ("", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archives.twice(path, lambda archive: archive.writestr("archive/data.pkl", b"\x80\x02}."))
    with pytest.raises(ConfigError, match="one name twice"):
        files.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        files.read(tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        files.read(tmp_path)
