"""The one schema: frozen dataclasses that a recipe's YAML and `a.b=value` overrides must fit (read by config/loading.py).

Every number a run depends on is here or in its recipe; the resolved form and its hash are saved with the run.
"""

from cmt_fast.config.schema.data import Data, Digits, Gmm, Latents, Npz, Photos
from cmt_fast.config.schema.model import Dit, Edm, Edm2, Mlp, Model, WideHead, weighs
from cmt_fast.config.schema.objective import (
    DIFFUSION,
    AlphaFlow,
    Ayf,
    CmtCm,
    CmtMf,
    Denoise,
    Distance,
    Drift,
    Ecd,
    Ect,
    Flow,
    IMeanFlow,
    Imm,
    Lagrangian,
    MeanFlow,
    Objective,
    Scd,
    Sct,
    Semigroup,
    Shortcut,
)
from cmt_fast.config.schema.run import Dali, Eval, Features, Feed, Run, SamplerConfig, Torch
from cmt_fast.config.schema.stage import (
    AUGMENTATIONS,
    STAGES,
    Anchor,
    Augment,
    Autoguidance,
    ConstantEma,
    Ema,
    Perceptual,
    PowerEma,
    Stage,
    Trajectories,
)
