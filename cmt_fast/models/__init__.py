"""From a recipe's model to the network that training and sampling call."""

from __future__ import annotations

from torch import nn

from cmt_fast.models import dit, mlp
from cmt_fast.models.precond import AverageVelocity, Denoiser
from cmt_fast.schema import Dit, Model


def build(model: Model, path: str, sigma_data: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A Denoiser (path "ve") or AverageVelocity (path "linear") for data of `shape` (C, H, W) or (D,).

    Raises ValueError naming the key where model and data do not fit.
    """
    two_times = path == "linear"
    if isinstance(model, Dit):
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"model.kind: a dit needs square images, the data has the shape {shape}")
        width, depth, heads = (
            given or preset for given, preset in zip((model.width, model.depth, model.heads), dit.SIZES[model.size])
        )
        net: nn.Module = dit.DiT(
            shape[0],
            shape[1],
            classes,
            width=width,
            depth=depth,
            heads=heads,
            patch=model.patch,
            two_times=two_times,
            qk_norm=model.qk_norm,
            rope=model.rope,
            checkpoint_activations=model.checkpoint_activations,
        )
    else:
        if len(shape) != 1:
            raise ValueError(f"model.kind: an mlp needs vectors, the data has the shape {shape}")
        net = mlp.Mlp(shape[0], classes, width=model.width, depth=model.depth, two_times=two_times)
    return AverageVelocity(net) if two_times else Denoiser(net, sigma_data)
