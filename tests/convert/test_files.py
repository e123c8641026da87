"""`.pt` and safetensors files: which network is read, and that nothing in a hostile one runs."""

from __future__ import annotations

import argparse
import hashlib
import os
import warnings

import pytest
import torch
from safetensors.torch import save, save_file

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.convert import files
from cmt_fast.data import archives as archives_
from cmt_fast.data import arrays
from cmt_fast.perceptual import distance
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


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_waited_for_by_nobody(tmp_path, made):
    for name in ("x.pt", "x.npz", "x.safetensors"):
        made(tmp_path / name)
    with pytest.raises(ConfigError, match="is no file"):
        files.read(tmp_path / "x.pt")
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(ConfigError, match="is no file"):
            distance._tensors("weights", str(tmp_path / name))
    with pytest.raises(arrays.NoArrays, match="is no file"):
        arrays.read(tmp_path / "x.npz", ("a",))
    with pytest.raises(ConfigError):
        loading.load(str(tmp_path / "x.npz"))
    with pytest.raises(ConfigError):
        archives_.Archive(tmp_path / "x.npz")


def test_bare_state_dicts_and_safetensors(tmp_path):
    torch.save(state(), tmp_path / "bare.pt")
    save_file(state(), tmp_path / "bare.safetensors", {"format": "pt"})
    for name, kind in (("bare.pt", "torch"), ("bare.safetensors", "safetensors")):
        found = files.read(tmp_path / name)
        assert same(found.tensors, state()) and (found.kind, found.entry) == (kind, "")
    torch.save({"first": state(), "second": state(1)}, tmp_path / "two.pt")
    with pytest.raises(ConfigError, match="--ema: is missing; the file has first, second"):
        files.read(tmp_path / "two.pt")


def padded(path, length: int | None = None, first: int = 0):
    """A safetensors file with spaces behind its header until the header's length is `length`, or ends in the byte `first`."""
    whole = save(state())
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip()
    length = length or len(header) + (first - len(header)) % 256
    path.write_bytes(
        length.to_bytes(8, "little") + header.ljust(length) + whole[8 + int.from_bytes(whole[:8], "little") :]
    )
    return path


# met in public: huggingface/diffusers#5328
def test_safetensors_with_each_first_byte_of_the_header_length(tmp_path):
    """0x80 begins a pickle, "P" an archive, "<" a web page. huggingface/diffusers#7782, #5328 and deepspeedai/DeepSpeed#2945:
    safetensors taken for pickles, `invalid load key, ' '`, `'<'`, `'\\xec'`: each the first byte of a header's length."""
    for first in range(256):
        path = padded(tmp_path / "x.bin", first=first)
        assert path.read_bytes()[0] == first
        found = files.read(path)
        assert found.kind == "safetensors" and same(found.tensors, state()), first
    length = int.from_bytes(b"PK\0\0\0\0\0\0", "little")  # 19,280: the file begins as an archive does
    found = files.read(padded(tmp_path / "x.bin", length))
    assert found.kind == "safetensors" and same(found.tensors, state())
    for start in (b"PK\x03\x04", b"\x80\x02\x8a\x03", b"\x80\x04\x95\x05"):  # the same with headers of up to 96 MB
        assert files._kind(start + b"\0\0\0\0{" + b" " * 40) == "safetensors"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_and_pickles_of_every_protocol_are_told_apart(tmp_path, protocol):
    path = tmp_path / "x.bin"
    torch.save(state(), path, pickle_protocol=min(protocol, 3))
    assert files.read(path).kind == "torch"
    torch.save(state(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    if protocol < 4:
        assert files.read(path).kind == "torch" and same(files.read(path).tensors, state())
    else:  # torch's own safe reader does not read it
        with pytest.raises(ConfigError, match=f"before 1.6 with pickle protocol {protocol}.*torch.save it anew"):
            files.read(path)
    net = pickled.network(path, protocol=protocol)
    assert files.read(path).kind == "pickle" and same(files.read(path).tensors, net.state_dict())


def test_a_file_without_an_ema_is_said_to_have_none(tmp_path):
    """zhuyu-cs/MeanFlow#12: published files held "model" where the script reads "ema", and their FID was 2 higher."""
    for entries, said in (({"model": state()}, True), ({"model": state(1), "ema": state()}, False)):
        torch.save(entries, tmp_path / "x.pt")
        notes = files.read(tmp_path / "x.pt").notes
        assert any("has no EMA; its entry 'model' is taken" in note for note in notes) == said
    assert not files.read(tmp_path / "x.pt", "model").notes  # asked for by name


def test_what_was_not_downloaded_is_called_so(tmp_path):
    """huggingface/diffusers#13559, NVlabs/CALM#7: a pointer of Git LFS ends in `invalid load key, 'v'`."""
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 19332096\n")
    with pytest.raises(ConfigError, match="pointer of Git LFS and not the file it stands for"):
        files.read(path)
    path.write_text("\n<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    with pytest.raises(ConfigError, match="a web page and no checkpoint"):
        files.read(path)
    path.write_bytes(padded(tmp_path / "whole").read_bytes()[:40])  # cut in the header
    with pytest.raises(ConfigError, match="is damaged"):
        files.read(path)


def test_a_file_is_read_for_its_checksum_only_when_that_is_asked_for(tmp_path, monkeypatch):
    path = padded(tmp_path / "x.safetensors")
    monkeypatch.setattr(files, "_sha256", lambda *_: pytest.fail("all bytes were read"))
    found = files.read(path)
    monkeypatch.undo()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_arguments_of_a_training_script_keep_what_is_plain(tmp_path):
    """A namespace (DiT, SiT, REPA), or a nested config (LightningDiT)."""
    inner = {"model_type": "LightningDiT-XL/1", "use_rope": True, "odd": [1]}
    torch.save({"ema": state(), "config": {"model": inner, "transport": {"loss_weight": None}}}, tmp_path / "a.pt")
    said = {"model.model_type": "LightningDiT-XL/1", "model.use_rope": True, "transport.loss_weight": None}
    assert files.read(tmp_path / "a.pt").about["args"] == said


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
    with pytest.raises(ConfigError, match="is no file"):
        files.read(tmp_path)
