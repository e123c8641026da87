"""A recipe and public checkpoints so small that they are imported, trained and exported in a second."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import yaml

from cmt_fast import models
from cmt_fast.schema import Edm2
from tests.convert import pickled

SIDE, CLASSES, WIDTH = 8, 3, 8
EDM2 = {"kind": "edm2", "width": WIDTH, "multipliers": [1, 2], "blocks": 1, "attention": [4], "head": 8}
SIT = {"kind": "dit", "embeddings": "dit", "width": 16, "depth": 1, "heads": 2}
ARGUMENTS = {
    "img_resolution": SIDE, "img_channels": 4, "label_dim": CLASSES, "model_channels": WIDTH, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "sigma_data": 0.5,
}  # fmt: skip


def recipe(folder: Path, model: dict, path: str = "ve", channels: int = 4, name: str = "small") -> Path:
    """A YAML file of two stages, over a few random arrays."""
    random = np.random.default_rng(0)
    images = random.normal(size=(12, channels, SIDE, SIDE)).astype(np.float32) * 0.5
    np.savez(folder / "data.npz", images=images, labels=np.arange(12) % CLASSES)
    ve = path == "ve"
    times = {} if ve else {"t_max": 1.0, "t_min": 0.0}
    solver = {"solver": "dpmpp" if ve else "euler", **times}
    stage = {"images_nimg": 8, "batch": 4}
    tree = {
        "name": name, "data": {"kind": "npz", "path": str(folder / "data.npz")}, "model": model, "path": path,
        "pre": {"objective": {"kind": "denoise" if ve else "flow"}, **stage},
        "mid": {
            "objective": {"kind": "cmt_cm" if ve else "cmt_mf"}, "start": "pre", "teacher": "pre", **stage,
            "trajectories": {**solver, "nfe": 4, "per_trajectory": 4, "pool_steps": 1},
        },
        "post": {"objective": {"kind": "ect" if ve else "meanflow"}, "start": "mid", **stage},
        "sampler": solver, "eval": {"n": 4, "n_during": 4, "batch": 4},
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def edm2_state() -> dict[str, torch.Tensor]:
    """Weights of a small EDM2 by the names that its authors give them."""
    torch.manual_seed(0)
    made = Edm2(width=WIDTH, multipliers=(1, 2), blocks=1, attention=(4,), head=8)
    net = models.build(made, "ve", 0.5, (4, SIDE, SIDE), CLASSES)
    names = [
        (r"net\.log_variance\.fourier\.", "logvar_fourier."),
        (r"net\.log_variance\.out\.", "logvar_linear."),
        (r"net\.fourier\.", "unet.emb_fourier."),
        (r"frequency$", "freqs"),
        (r"phase$", "phases"),
        (r"net\.(noise|label)\.", r"unet.emb_\1."),
        (r"net\.conv\.", f"unet.enc.{SIDE}x{SIDE}_conv."),
        (r"net\.out_gain", "unet.out_gain"),
        (r"net\.out\.", "unet.out_conv."),
        (r"net\.(enc|dec)oder\.(\w+)\.gain", r"unet.\1.\2.emb_gain"),
        (r"net\.(enc|dec)oder\.(\w+)\.emb\.", r"unet.\1.\2.emb_linear."),
        (r"net\.(enc|dec)oder\.(\w+)\.conv1\.", r"unet.\1.\2.conv_res0."),
        (r"net\.(enc|dec)oder\.(\w+)\.conv2\.", r"unet.\1.\2.conv_res1."),
        (r"net\.(enc|dec)oder\.(\w+)\.skip\.", r"unet.\1.\2.conv_skip."),
        (r"net\.(enc|dec)oder\.(\w+)\.(qkv|proj)\.", r"unet.\1.\2.attn_\3."),
    ]
    out = {}
    for name, tensor in net.state_dict().items():
        for pattern, to in names:
            name = re.sub(pattern, to, name)
        out[name] = torch.randn(tensor.shape) * 0.3 + 0.1
    return out


def edm2(path: Path, half: bool = True, **arguments) -> dict[str, torch.Tensor]:
    """Writes a snapshot in the style of EDM2; returns its tensors."""
    state = {k: v.half() if half else v for k, v in edm2_state().items()}
    net = pickled.tree(state, ("freqs", "phases"), **{**ARGUMENTS, **arguments})
    path.write_bytes(pickled.dumps({"ema": net, "encoder": pickled.Encoder(), "loss_fn": None}))
    return state


def sit_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a small SiT by its authors' names: width 16, one block of two heads, a learned variance."""
    from cmt_fast.models.dit import positions

    torch.manual_seed(seed)
    width, patch = 16, 2
    shapes = {
        "x_embedder.proj.weight": (width, 4, patch, patch), "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
        "blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width), "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width), "blocks.0.mlp.fc1.bias": (4 * width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width), "blocks.0.mlp.fc2.bias": (width,),
        "blocks.0.adaLN_modulation.1.weight": (6 * width, width), "blocks.0.adaLN_modulation.1.bias": (6 * width,),
        "final_layer.linear.weight": (patch**2 * 8, width), "final_layer.linear.bias": (patch**2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width), "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    state = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    return {"pos_embed": positions(SIDE // patch, width, columns_first=True)[None].float(), **state}
