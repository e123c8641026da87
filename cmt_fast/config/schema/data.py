"""What a run may be trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cmt_fast.config.schema.numbers import Count, Natural, Positive, schema

# the network's class of each class of the data; "stored": the numbers that their source gave them
ClassIds = tuple[Natural, ...] | Literal["stored"] | None


@schema
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, scaled to [-1, 1], ten classes."""

    kind: Literal["digits"] = "digits"


@schema
class Photos:
    """3,600 windows, 32 x 32 in colour, of six photographs inside scikit-learn and scikit-image, the photographs as classes."""

    kind: Literal["photos"] = "photos"


@schema
class Gmm:
    """A 2-D Gaussian mixture on a circle: denoiser, velocity and flow map are known in closed form."""

    kind: Literal["gmm"] = "gmm"
    components: Count = 6
    radius: Positive = 1.0
    std: Positive = 0.25
    n: Count = 20000


@schema
class Npz:
    """A file of one's own: `images` (N, C, H, W), float32 in [-1, 1] or uint8, and optionally `labels` (N,).

    range: these two numbers become -1 and 1, in place of 0 and 255 of uint8; layout: hwc where channels come last;
    unchecked: numbers are taken whatever their range and standard deviation. class_ids, classes: as of `Latents`.
    """

    path: str
    kind: Literal["npz"] = "npz"
    class_ids: ClassIds = None
    classes: Count | None = None
    range: tuple[float, float] | None = None
    layout: Literal["chw", "hwc"] = "chw"
    unchecked: bool = False


@schema
class Expected:
    """What a recipe's rows must be like: shape (C, H, W) of one, number of classes, their own or, with `data.class_ids`, the
    network's (0: no labels; by default any)."""

    shape: tuple[Count, Count, Count]
    classes: Natural | None = None


@schema
class Latents:
    """A store made by `cmt data encode`, `import` or `shards`: latents, or 8-bit images in [-1, 1].

    flip: mirror images are rows too. z = scale (x - mean) / std: a channel's own mean and std over the data unless given
    here, one number or one a channel, as public checkpoints need (Stable Diffusion: mean 0, std 1, scale 0.18215). expects:
    another store is refused, and the recipe can be checked where its store is not. class_ids: the network's class of each class
    of the store, classes: rows of the network's table of labels, for a network that knows more than the store has. unchecked:
    numbers are taken whatever their standard deviation.
    """

    path: str
    kind: Literal["latents"] = "latents"
    flip: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    scale: Positive = 0.5
    class_ids: ClassIds = None
    classes: Count | None = None
    expects: Expected | None = None
    unchecked: bool = False


Data = Annotated[Digits | Photos | Gmm | Npz | Latents, Field(discriminator="kind")]
