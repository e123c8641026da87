"""RAE's autoencoder, whose latents are an encoder's features, through the same front door; its encoder is a stand-in here, as
transformers, which has the real one, is no part of this project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cmt_fast.cli import main
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Latents
from cmt_fast.data import opening
from cmt_fast.data.autoencoder import Codec, Normalisation

diffusers = pytest.importorskip("diffusers")
rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """An AutoencoderRAE of 8 channels and 2 x 2 tokens, normalised number by number, as diffusers saves it."""
    patches = lambda model, x: model(x).flatten(2).transpose(1, 2)
    monkeypatch.setattr(rae, "_build_encoder", lambda **more: nn.Conv2d(3, 8, 14, stride=14))
    monkeypatch.setitem(rae._ENCODER_FORWARD_FNS, "dinov2", patches)
    monkeypatch.setattr(diffusers.utils, "is_transformers_available", lambda: True)
    torch.manual_seed(0)
    small = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    made = diffusers.AutoencoderRAE(
        encoder_hidden_size=8, encoder_input_size=28, patch_size=4, decoder_intermediate_size=16, **small,
        latents_mean=torch.randn(8, 2, 2), latents_std=torch.rand(8, 2, 2) + 0.5,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "rae")
    return tmp_path / "rae"


def test_its_latents_are_those_that_it_normalises_itself(folder: Path) -> None:
    codec = Codec.open(str(folder), "cpu")
    own = diffusers.AutoencoderRAE.from_pretrained(folder, low_cpu_mem_usage=False)
    assert (codec.channels, codec.factor, codec.spreads) == (8, 4, False)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    mean, std = codec.encode(images)
    with torch.no_grad():
        assert torch.equal(mean, own.encode((images + 1) / 2).latent) and not std.any()
        want = own.decode(mean).sample * 2 - 1
    torch.testing.assert_close(codec.decode(mean), want.clamp(-1, 1))
    halved = Codec.open(str(folder), "cpu", Normalisation.of((0.0,), (1.0,), 0.5, 8))
    torch.testing.assert_close(halved.decode(mean / 2), want.clamp(-1, 1))


def test_a_store_of_its_latents_is_read_as_it_is(folder: Path, tmp_path: Path, capsys) -> None:
    for i in range(12):
        place = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(place)
    command = ["data", "encode", str(tmp_path / "images"), str(tmp_path / "store"), "--vae", str(folder), "--size", "8"]
    assert main([*command, "--statistics", "mean+std"]) == 2
    assert "have no standard deviation of their own; take mean" in capsys.readouterr().err
    assert main(command) == 0, capsys.readouterr().err
    one = {"mean": (0.0,), "std": (1.0,), "scale": 1.0, "unchecked": True}
    store = opening.load(Latents(str(tmp_path / "store"), **one))
    assert (store.shape, store.classes, store.index.kind) == ((8, 2, 2), 3, "mean")
    assert len(store.normalisation.mean) == 8
    image = torch.from_numpy(np.array(Image.open(tmp_path / "images" / "class0" / "0.png")))
    want, _ = Codec.open(str(folder), "cpu").encode(image.permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert torch.equal(store.rows(torch.tensor([0]))[0], want.half().float())


def test_without_transformers_it_is_one_line(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(diffusers.utils, "is_transformers_available", lambda: False)
    with pytest.raises(ConfigError, match="is an AutoencoderRAE, whose encoder needs transformers"):
        Codec.open(str(folder), "cpu")
