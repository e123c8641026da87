"""The losses of all stages."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cmt_fast.config.schema.numbers import Count, Fraction, Natural, NotNegative, Positive, schema

# what an objective asks its network for: a denoiser or a velocity; where a trajectory ends, from any of its points; the average
# velocity between any two; between two whose times differ by a power of 1/2
Asks = Literal["instant", "end", "pairs", "halves"]


@schema
class Denoise:
    """EDM denoising: ln t ~ N(mean, std^2). `uncertainty`: each noise weighted by the network's learned log variance."""

    kind: Literal["denoise"] = "denoise"
    asks: ClassVar[Asks] = "instant"
    mean: float = -1.2
    std: Positive = 1.2
    uncertainty: bool = False


@schema
class Flow:
    """Flow matching: t ~ logit-normal(mean, std), or uniform on (0, 1); then t <- shift t / (1 + (shift - 1) t)."""

    kind: Literal["flow"] = "flow"
    asks: ClassVar[Asks] = "instant"
    mean: float = -0.4
    std: Positive = 1.0
    law: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: Positive = 1.0


# the last three are of features: of the run's own classifier, of VGG16 on pixels, of a classifier of latents
Distance = Literal["squared_l2", "l2", "pseudo_huber", "features", "lpips", "latent_lpips"]


@schema
class CmtCm:
    """Consistency mid-training of a consistency function. `features`: squared l2 in a frozen network's features.

    `lpips` and `latent_lpips` read their network from the stage's `perceptual.weights`.
    """

    kind: Literal["cmt_cm"] = "cmt_cm"
    asks: ClassVar[Asks] = "end"
    distance: Distance = "l2"
    c: Positive = 0.01


@schema
class CmtMf:
    """Consistency mid-training of an average velocity."""

    kind: Literal["cmt_mf"] = "cmt_mf"
    asks: ClassVar[Asks] = "pairs"


@schema
class Ect:
    """Easy consistency tuning: r = t (1 - n(t)/q^(s+1)), n(t) = 1 + k sigmoid(-b t); s grows by one `doublings` times."""

    kind: Literal["ect"] = "ect"
    asks: ClassVar[Asks] = "end"
    mean: float = -1.1
    std: Positive = 2.0
    q: Annotated[float, Field(gt=1)] = 64.0
    k: NotNegative = 8.0
    b: float = 1.0
    doublings: Natural = 0
    distance: Distance = "pseudo_huber"
    c: Positive = 0.01
    weight: Literal["inverse_step", "snr", "one"] = "inverse_step"


@schema
class Ecd(Ect):
    """Easy consistency distillation: ECT with the teacher's ODE step from t to r in place of the data's noise."""

    kind: Literal["ecd"] = "ecd"  # type: ignore[assignment]  # a tag, each its own
    weight: Literal["inverse_step", "snr", "one"] = "snr"
    step: Literal["euler", "heun"] = "heun"


@schema
class MeanFlow:
    """MeanFlow: the share `ratio` of rows has r < t and carries tangents; guidance inside the target by omega, kappa.

    `velocity` teacher: v is the (guided) teacher's, not the data's; `law` and `shift` of both times as in `Flow`.
    """

    kind: Literal["meanflow"] = "meanflow"
    asks: ClassVar[Asks] = "pairs"
    mean: float = -0.4
    std: Positive = 1.0
    ratio: Fraction = 0.25
    p: NotNegative = 1.0
    c: Positive = 0.01
    omega: float = 1.0
    kappa: float = 0.0
    guide_t_min: Fraction = 0.0
    guide_t_max: Fraction = 1.0
    law: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: Positive = 1.0
    velocity: Literal["data", "teacher"] = "data"


@schema
class IMeanFlow(MeanFlow):
    """Improved MeanFlow: u + (t - r) sg(du/dt) regressed on v, the derivative along the model's own velocity.

    That is u(z, t, t), or with `head` the output of the network's auxiliary head, trained beside it. `omega_max`: above 1
    the network is told a guidance scale, drawn from [1, omega_max] with a density that falls as 1/omega^omega_beta, and an
    interval, and its target is guided by them.
    """

    kind: Literal["imeanflow"] = "imeanflow"  # type: ignore[assignment]  # a tag, each its own
    ratio: Fraction = 0.5
    head: bool = False
    omega_max: Annotated[float, Field(ge=1)] = 1.0
    omega_beta: NotNegative = 1.0


@schema
class Sct:
    """Continuous-time consistency training in TrigFlow: ln t ~ N(mean, std^2), t = sigma_data tan(theta).

    The derivative's share grows from 0 to 1 over `warmup_nimg`; the tangent g becomes g / (|g| + c), `c: null` leaves it
    as it is. `weight`: of a row, 1 or 1/t; `uncertainty`: also the learned e^w(t), w the network's log variance with its sign
    changed.
    """

    kind: Literal["sct"] = "sct"
    asks: ClassVar[Asks] = "end"
    mean: float = -1.0
    std: Positive = 1.4
    warmup_nimg: Natural = 0
    c: Positive | None = 0.1
    weight: Literal["one", "inverse_t"] = "one"
    uncertainty: bool = False


@schema
class Scd(Sct):
    """Continuous-time consistency distillation: `sct` along the teacher's ODE in place of the data's noise."""

    kind: Literal["scd"] = "scd"  # type: ignore[assignment]  # a tag, each its own


@schema
class Ayf:
    """Align Your Flow's Eulerian map distillation: t - r = sigmoid(N(mean, std^2)), r uniform in what is left of [0, 1].

    The derivative's share grows from 0 to `most` over the first `warmup` of the stage; the tangent g becomes g / (|g| + c),
    `c: null` leaves it as it is.
    """

    kind: Literal["ayf"] = "ayf"
    asks: ClassVar[Asks] = "pairs"
    mean: float = -0.8
    std: Positive = 1.0
    warmup: Fraction = 0.2
    most: Fraction = 0.99
    c: Positive | None = 0.1


@schema
class Lagrangian(MeanFlow):
    """Lagrangian flow map matching: dX_{t->r}/dr = v(X_{t->r}, r). The share `ratio` of rows has r < t and carries tangents.

    `velocity` own: v is the network's own u(z, r, r), which the rows with r = t learn from data; teacher: the (guided) teacher's.
    `law`: of both times, uniform as published or logit-normal(mean, std).
    """

    kind: Literal["lagrangian"] = "lagrangian"  # type: ignore[assignment]  # a tag, each its own
    p: NotNegative = 0.0
    law: Literal["uniform", "logit_normal"] = "uniform"
    velocity: Literal["own", "teacher"] = "own"  # type: ignore[assignment]  # of its own rows with r = t, not the data's


@schema
class Semigroup(MeanFlow):
    """Progressive self-distillation: X_{t->r} = X_{m->r} o X_{t->m}, on the share `ratio` of rows; the others have r = t.

    `split`: where m is between r and t, anywhere or in the middle; `velocity`, `law` as in `Lagrangian`.
    """

    kind: Literal["semigroup"] = "semigroup"  # type: ignore[assignment]  # a tag, each its own
    p: NotNegative = 0.0
    law: Literal["uniform", "logit_normal"] = "uniform"
    velocity: Literal["own", "teacher"] = "own"  # type: ignore[assignment]  # of its own rows with r = t, not the data's
    split: Literal["uniform", "middle"] = "uniform"


@schema
class Shortcut:
    """Shortcut models: jumps of lengths 1, 1/2, ..., 2/`grid`, each learned from two of half the length; t on its grid.

    The share `ratio` of rows bootstraps, the others are flow matching on the multiples of 1/`grid`. `omega`: classifier-free
    guidance of the shortest steps. Points and targets are clipped to [-clip, clip], `clip: null` leaves them.
    """

    kind: Literal["shortcut"] = "shortcut"
    asks: ClassVar[Asks] = "halves"
    ratio: Fraction = 0.25
    grid: Count = 128
    omega: float = 1.0
    clip: Positive | None = 4.0


@schema
class AlphaFlow(MeanFlow):
    """AlphaFlow: from trajectory flow matching (alpha = 1) to MeanFlow (alpha = 0), over the stage from `begin` to `end`.

    alpha = sigmoid(-gamma (x - 1/2)), x the progress between the two; nearer to 0 or 1 than `clamp` it is that. Targets of
    steps are clipped to [-clip, clip], `clip: null` leaves them.
    """

    kind: Literal["alphaflow"] = "alphaflow"  # type: ignore[assignment]  # a tag, each its own
    ratio: Fraction = 0.5
    begin: Fraction = 0.0
    end: Fraction = 1.0
    gamma: Positive = 25.0
    clamp: Annotated[float, Field(gt=0, lt=0.5)] = 0.005
    clip: Positive | None = None


@schema
class Imm:
    """Inductive moment matching: sets of `group` rows that share (s, r, t), t ~ U(0, t_max), s ~ U(0, t).

    r is the later of s and eta^-1(eta(t) - eta_max / 2^k), eta = t / (1 - t). Rows weigh by a sigmoid of the log-SNR, shifted by
    b, and (1 - t)^a. diagonal: whether a row is compared with its own target too, as published; without, it is unbiased.
    """

    kind: Literal["imm"] = "imm"
    asks: ClassVar[Asks] = "pairs"
    group: Count = 4
    t_max: Annotated[float, Field(gt=0, lt=1)] = 0.994
    eta_max: Positive = 160.0
    k: Annotated[float, Field(ge=0, le=24)] = 12.0
    a: NotNegative = 2.0
    b: float = 4.0
    diagonal: bool = True


@schema
class Drift:
    """Drifting of a one-step generator: sets of `group` samples move toward as many real rows and away from each other.

    by_class: a set is of one class. space: what kernels compare, the rows themselves or maps of `perceptual.weights`.
    t_max: where the generator takes its noise on the path `ve`, 80 unless it is set.
    """

    kind: Literal["drift"] = "drift"
    asks: ClassVar[Asks] = "end"
    group: Annotated[int, Field(ge=2)] = 64
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.02, 0.05, 0.2)
    space: Literal["data", "lpips", "latent_lpips"] = "data"
    by_class: bool = True
    t_max: Positive | None = None


# kinds whose networks are diffusion models, which an ODE solver samples; any other network jumps
DIFFUSION = ("denoise", "flow")

Objective = Annotated[
    Denoise
    | Flow
    | CmtCm
    | CmtMf
    | Ect
    | Ecd
    | MeanFlow
    | IMeanFlow
    | Sct
    | Scd
    | Ayf
    | Lagrangian
    | Semigroup
    | Shortcut
    | AlphaFlow
    | Imm
    | Drift,
    Field(discriminator="kind"),
]
