"""From a recipe's model to the network that training and sampling call."""

from __future__ import annotations

from torch import nn

from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp, Model
from cmt_fast.models import dit, edm, edm2, mlp
from cmt_fast.models.layers import LogVariance
from cmt_fast.models.precond import AverageVelocity, Denoiser, NoiseDenoiser


def build(model: Model, path: str, sigma_data: float, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A Denoiser (path "ve") or AverageVelocity (path "linear") for data of `shape` (C, H, W) or (D,).

    A network whose model asks for one gets a log variance, made last: what stands beside it begins as it does without. Raises
    ValueError naming the key where model and data do not fit.
    """
    two_times = path == "linear"
    _check_average_velocity(model, two_times, classes)
    net = _network(model, shape, classes, two_times)
    if getattr(model, "log_variance", False):
        if two_times:
            raise ValueError("model.log_variance: true is for the path 've', this run's is 'linear'; take false")
        net.log_variance = LogVariance()
    if getattr(model, "precondition", "edm") == "ddpm":
        if two_times:
            raise ValueError("model.precondition: 'ddpm' is for the path 've', this run's is 'linear'")
        return NoiseDenoiser(net)
    return AverageVelocity(net) if two_times else Denoiser(net, sigma_data)


def _network(model: Model, shape: tuple[int, ...], classes: int, two_times: bool) -> nn.Module:
    if isinstance(model, Mlp):
        if len(shape) != 1:
            raise ValueError(f"model.kind: an mlp needs vectors, the data has the shape {shape}")
        told = {"guided": model.guided, "velocity_head": model.velocity_head}
        return mlp.Mlp(shape[0], classes, width=model.width, depth=model.depth, two_times=two_times, **told)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"model.kind: {'a' if model.kind == 'dit' else 'an'} {model.kind} needs square images, the data has the shape {shape}"
        )
    if isinstance(model, Dit):
        return _dit(model, shape, classes, two_times)
    make = _edm2 if isinstance(model, Edm2) else _edm
    return make(model, shape, classes if model.conditional else 0, two_times)


def _check_average_velocity(model: Model, two_times: bool, classes: int) -> None:
    """Raises ValueError where a network is to be told a guidance, or to have a velocity beside its output, that cannot be."""
    told, head = getattr(model, "guided", False), getattr(model, "velocity_head", None)
    for key, asked in (("guided", told), ("velocity_head", head is not None)):
        if asked and not two_times:
            raise ValueError(f"model.{key}: is for the path 'linear', this run's is 've'")
    if told and not classes:
        raise ValueError("model.guided: guidance needs class labels, and this data has none")
    depth = (
        model.depth if isinstance(model, Mlp) else model.depth or dit.SIZES[model.size][1] if head is not None else 0
    )
    if head is not None and getattr(model, "wide_head", None):
        raise ValueError(
            "model.velocity_head: is not beside model.wide_head, which has no place for a second; leave one out"
        )
    if head is not None and head > depth:
        raise ValueError(f"model.velocity_head: {head} blocks are more than the network's {depth}")


def augment_labels(model: Model) -> int:
    """How many labels of an augmentation the network of this model takes: 0 for all but EDM's U-Nets."""
    if not isinstance(model, Edm):
        return 0
    return edm.PRESETS[model.preset]["augment"] if model.augment is None else model.augment


def fold(net: nn.Module) -> nn.Module:
    """Let a frozen network do once what each of its calls would repeat: the normalisation of EDM2's weights."""
    for module in net.modules():
        if hasattr(module, "fold"):
            module.fold()
    return net


def _dit(model: Dit, shape: tuple[int, ...], classes: int, two_times: bool) -> nn.Module:
    width, depth, heads = (
        given or preset for given, preset in zip((model.width, model.depth, model.heads), dit.SIZES[model.size])
    )
    return dit.DiT(
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
        mlp=model.mlp,
        norm=model.norm,
        embeddings=model.embeddings,
        wide_head=(h.width, h.depth, h.heads) if (h := model.wide_head) else None,
        checkpoint_activations=model.checkpoint_activations,
        guided=model.guided,
        velocity_head=model.velocity_head,
    )


def _edm2(model: Edm2, shape: tuple[int, ...], classes: int, two_times: bool) -> nn.Module:
    width, dropout = edm2.SIZES[model.size]
    return edm2.Edm2(
        shape[0],
        shape[1],
        classes,
        width=model.width or width,
        multipliers=model.multipliers,
        blocks=model.blocks,
        attention=model.attention,
        head=model.head,
        dropout=dropout if model.dropout is None else model.dropout,
        dropout_max_side=model.dropout_max_side,
        two_times=two_times,
        checkpoint_activations=model.checkpoint_activations,
    )


def _edm(model: Edm, shape: tuple[int, ...], classes: int, two_times: bool) -> nn.Module:
    given = {k: getattr(model, k) for k in ("width", "multipliers", "blocks", "attention", "augment", "dropout")}
    options = edm.PRESETS[model.preset] | {k: v for k, v in given.items() if v is not None}
    return edm.Edm(
        shape[0],
        shape[1],
        classes,
        two_times=two_times,
        checkpoint_activations=model.checkpoint_activations,
        **options,
    )
