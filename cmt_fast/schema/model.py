"""The networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.schema.numbers import Count, schema


@schema
class Dit:
    """Diffusion transformer. `size` sets width, depth and heads; each may be set by itself.

    `checkpoint_activations`: blocks keep their input alone and run again in the backward pass: less memory, more time.
    """

    kind: Literal["dit"] = "dit"
    size: Literal["tiny", "S", "B", "L", "XL"] = "tiny"
    patch: Count = 2
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    qk_norm: bool = False
    rope: bool = False
    checkpoint_activations: bool = False


@schema
class Mlp:
    """Residual MLP for vectors."""

    kind: Literal["mlp"] = "mlp"
    width: Count = 128
    depth: Count = 3


Model = Annotated[Dit | Mlp, Field(discriminator="kind")]
