"""Published budgets and facts that an estimate is set beside, with their sources.

Each budget says what a student image cost as its own code does it: calls of which network, in which precision, one op
after another. Image counts and hours are the sources'. What they do not state and is taken here stands in `assumed`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cmt_fast.config.schema import Dit, Edm, Edm2, Model
from cmt_fast.cost.flops import Term

# training images of the data sets, by the beginning of a store's name
IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "ffhq": 70_000, "afhqv2": 15_803}


class Part(NamedTuple):
    """A stretch of training: images, batch, work for one image, precision."""

    name: str
    images: int
    batch: int
    work: tuple[Term, ...]
    precision: str


class Budget(NamedTuple):
    """recipes: those it is set beside; hours: reported, the unit is in `assumed` where it is not stated; fid: 1 and 2 steps."""

    recipes: tuple[str, ...]
    name: str
    model: Model
    path: str
    shape: tuple[int, int, int]
    classes: int
    parts: tuple[Part, ...]
    source: str
    fid: str
    guide: Model | None = None
    distance: str | None = None
    hours: float | None = None
    assumed: str = ""


TRAIN = (Term("student", "forward", 1, "every row"), Term("student", "backward", 1, "every row"))
TARGET = Term("student", "forward", 1, "target")
TANGENT = Term("student", "tangent", 1, "all rows")
FEATURES = (
    Term("features", "forward", 2, "features of image and target"),
    Term("features", "input_gradient", 1, "their gradient to the image"),
)
ECT = (*TRAIN, TARGET)
# Heun's step of an autoguided teacher: 6.66 forwards of EDM2-XXL with M as its guide
ECD = (*TRAIN, TARGET, Term("teacher", "forward", 2, "Heun's step"), Term("guide", "forward", 2, "guide of the step"))
SCD = (*TRAIN, TANGENT, Term("teacher", "forward", 2, "guided velocity"))
AYF = (*TRAIN, TANGENT, Term("teacher", "forward", 1, "velocity"), Term("guide", "forward", 1, "guide of the velocity"))
# 7.04 forwards of a DiT-XL/2: the pass for tangents computes the values again
MEANFLOW = (
    *TRAIN,
    TANGENT,
    Term("student", "forward", 1, "values beside the tangents"),
    Term("student", "forward", 2, "guidance with and without label"),
)


def step_work(objective: str, teacher: float = 1.0) -> list[Term]:
    """Work of a plain step of `python -m bench step`: FM, CMT (also CMT-CM, CMT-MF), MF, ECT, ECD.

    teacher: its forwards an image of a CMT step. MF has tangents on a quarter of its rows; ECD Heun's step, unguided.
    """
    more = {
        "FM": [],
        "CMT": [Term("teacher", "forward", teacher, "rollouts")],
        "MF": [Term("student", "tangent", 0.25, "rows with r < t")],
        "ECT": [TARGET],
        "ECD": [TARGET, Term("teacher", "forward", 2, "Heun's step")],
    }
    return [*TRAIN, *more[objective.partition("-")[0]]]


def cmt(rows: int) -> tuple[Term, ...]:
    """CMT as published: each step rolls out `rows` trajectories of 16 calls for 16 rows each."""
    return (*TRAIN, Term("teacher", "forward", 1, "rollouts of this step alone", rows), *FEATURES)


def _pixels(recipe: str, model: Model, shape: tuple[int, int, int], fids: tuple[str, str]) -> tuple[Budget, Budget]:
    """Mid 38.4 M and post 12.8 M images, and ECT alone for as many."""
    source = "arXiv 2509.24526 and sony/cmt, 300k and 100k steps of 128, fp32"
    parts = (Part("mid", 38_400_000, 128, cmt(8), "fp32"), Part("post", 12_800_000, 128, ECT, "fp32"))
    alone = (Part("ECT", 51_200_000, 128, ECT, "fp32"),)
    known = (model, "ve", shape, 0)
    return (
        Budget((recipe,), "CMT + ECT as published", *known, parts, source, fids[0], distance="lpips"),
        Budget((recipe,), "ECT alone", *known, alone, "arXiv 2406.14548, as in arXiv 2509.24526", fids[1]),
    )


_512 = (("imagenet512-ecd", "imagenet512-dit"),)
_XXL = (Edm2(size="XXL"), "ve", (4, 64, 64), 1000)
_M = Edm2(size="M")
_XL = (("imagenet256-mf",), "MeanFlow from nothing", Dit(size="XL"), "linear", (4, 32, 32), 1000)

BUDGETS = (
    Budget(
        *_512, "CMT + ECD as published", *_XXL,
        (Part("mid", 12_800_000, 128, cmt(8), "tf32"), Part("post", 16_000_000, 128, ECD, "tf32")),
        "arXiv 2509.24526 and its released ImageNet-512 code: TF32", "3.38 / 1.84", _M, "latent_lpips",
    ),
    Budget(
        *_512, "ECD alone", *_XXL, (Part("ECD", 409_600_000, 128, ECD, "tf32"),),
        "arXiv 2509.24526's baseline", "8.47 / 3.38", _M, assumed="work and precision of the published ECD",
    ),
    Budget(
        *_512, "sCD", *_XXL, (Part("sCD", 409_600_000, 2048, SCD, "bf16"),),
        "arXiv 2410.11081, as in arXiv 2509.24526", "2.28 / 1.88",
        assumed="guidance by two calls of the teacher, batch 2048, half precision throughout",
    ),
    Budget(
        *_512, "AYF", *_XXL, (Part("AYF", 102_400_000, 2048, AYF, "bf16"),),
        "arXiv 2506.14603, as in arXiv 2509.24526", "3.32 / 1.87", _M,
        assumed="EDM2-XXL as the student, guide M, batch 2048, half precision throughout",
    ),
    Budget(
        *_XL, (Part("MeanFlow", 307_200_000, 256, MEANFLOW, "tf32"),),
        "arXiv 2509.24526: 1520 h; arXiv 2505.13447: 240 epochs", "3.43 / -", hours=1520,
        assumed="hours are those of one H100; tangents by func.jvp with math attention in a pass of their own, TF32",
    ),
    Budget(
        ("imagenet256-mf",), "CMT + MeanFlow as published", *_XL[2:], (),
        "arXiv 2509.24526: 38 + 135 + 587 h", "3.34 / -", hours=760,
        assumed="hours are those of one H100; images of the stages are not published",
    ),
    Budget(
        ("imagenet64-ecd", "imagenet64-ect"), "sCT", Edm2(size="S"), "ve", (3, 64, 64), 1000,
        (Part("sCT", 819_200_000, 2048, (*TRAIN, TANGENT), "bf16"),), "arXiv 2410.11081", "2.04 / 1.48",
        assumed="EDM2-S as the student (published: XL), 400k steps of 2048, half precision throughout",
    ),
    *_pixels("cifar10", Edm(preset="cifar10", conditional=False), (3, 32, 32), ("2.74 / 1.97", "3.54 / 2.12")),
    *_pixels("ffhq64", Edm(preset="ffhq64", conditional=False), (3, 64, 64), ("3.89 / 2.75", "5.99 / 4.39")),
    *_pixels("afhqv2-64", Edm(preset="afhqv2-64", conditional=False), (3, 64, 64), ("3.28 / 2.34", "3.89 / 2.61")),
)  # fmt: skip


def images(path: str) -> int | None:
    """Training images of the data set that a store is named after, None where it is not known."""
    name = path.rstrip("/").rpartition("/")[2]
    return next((n for known, n in IMAGES.items() if name.startswith(known)), None)


def public_network(name: str) -> Edm2 | None:
    """The network that a run is named after, edm2-img512-xxl or the like; None for other names."""
    found = re.match(r"edm2-img(?:64|512)-(xs|s|m|l|xl|xxl)\b", name)
    return Edm2(size=found[1].upper()) if found else None
