"""The networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.config.schema.numbers import Count, Natural, schema


@schema
class WideHead:
    """The wide, shallow head of DiT^DH (Zheng et al. 2025, RAE): blocks of their own width on the patches themselves, each token
    of which is modulated by the transformer's."""

    width: Count = 2048
    depth: Count = 2
    heads: Count = 16


@schema
class Dit:
    """Diffusion transformer. `size` sets width, depth and heads; each may be set by itself.

    `embeddings` dit: times and positions as in the published DiT, SiT, REPA and MeanFlow networks, which load into it; with
    `mlp: swiglu, norm: rms, rope: true` LightningDiT's do, and with `embeddings: gaussian` (times by waves of random
    frequencies) and a `wide_head` those of RAE and MF-RAE. `precondition` ddpm (path ve): the network predicts the noise of
    DDPM's 1000 variance-preserving steps, as DiT does; edm: EDM's preconditioning.
    `checkpoint_activations`: blocks keep their input alone and run again in the backward pass: less memory, more time.
    `log_variance` (path ve): a head for losses with learned weights (`uncertainty`). `guided` (path linear): the network is told
    a guidance scale and an interval of times; `velocity_head` (path linear): blocks of an auxiliary head for the velocity, which
    training alone uses. Both are improved MeanFlow's.
    """

    kind: Literal["dit"] = "dit"
    size: Literal["tiny", "S", "B", "L", "XL"] = "tiny"
    patch: Count = 2
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    qk_norm: bool = False
    rope: bool = False
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    embeddings: Literal["cmt", "dit", "gaussian"] = "cmt"
    precondition: Literal["edm", "ddpm"] = "edm"
    wide_head: WideHead | None = None
    checkpoint_activations: bool = False
    log_variance: bool = False
    guided: bool = False
    velocity_head: Natural | None = None


@schema
class Mlp:
    """Residual MLP for vectors. `log_variance`, `guided` and `velocity_head` as in a dit."""

    kind: Literal["mlp"] = "mlp"
    width: Count = 128
    depth: Count = 3
    log_variance: bool = False
    guided: bool = False
    velocity_head: Natural | None = None


@schema
class Edm2:
    """EDM2's U-Net. `size` sets the width; ImageNet-512's and ImageNet-64's networks differ in their data alone.

    `dropout`: by default the published one of the size, 0.1 from M upwards; in blocks of at most `dropout_max_side` (16 in
    ECT on ImageNet-64), by default in all, as EDM2 has it. `multipliers`: of the width, level by level, `attention`: the
    sides that have it. `conditional` false: labels of the data are not read. `checkpoint_activations` as in a dit.
    """

    kind: Literal["edm2"] = "edm2"
    size: Literal["XS", "S", "M", "L", "XL", "XXL"] = "S"
    conditional: bool = True
    width: Count | None = None
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 3, 4)
    blocks: Count = 3
    attention: tuple[Count, ...] = (16, 8)
    head: Count = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    dropout_max_side: Count | None = None
    checkpoint_activations: bool = False


@schema
class Edm:
    """EDM's U-Nets by data set: DDPM++ (cifar10, ffhq64, afhqv2-64), NCSN++ (the same, -ncsnpp) or ADM (imagenet64).

    What is not given is the preset's. `augment`: labels of an augmentation that the published networks were trained with: a
    stage that has it (`augment`) tells them, everywhere else they are 0. `log_variance` as in a dit. Otherwise as in an edm2.
    """

    kind: Literal["edm"] = "edm"
    preset: Literal[
        "cifar10", "ffhq64", "afhqv2-64", "cifar10-ncsnpp", "ffhq64-ncsnpp", "afhqv2-64-ncsnpp", "imagenet64"
    ] = "cifar10"
    conditional: bool = True
    width: Count | None = None
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    blocks: Count | None = None
    attention: tuple[Count, ...] | None = None
    augment: Natural | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    checkpoint_activations: bool = False
    log_variance: bool = False


Model = Annotated[Dit | Mlp | Edm2 | Edm, Field(discriminator="kind")]


def weighs(model: Model) -> bool:
    """Whether the network has a log variance, which a loss with learned weights asks for: every EDM2's, another's by its key."""
    return isinstance(model, Edm2) or model.log_variance
