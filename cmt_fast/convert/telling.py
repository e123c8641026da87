"""Which project a file is of: told by its tensors and by the arguments stored with it, never by the recipe or the file's name.

DiT, SiT and REPA without its projectors have the same tensors, but DiT predicts noise, SiT's time runs from noise to data and
REPA's from data to noise: read as another, a file gives pictures of nothing. Where neither tells, the user is asked.
"""

from __future__ import annotations

import re
from typing import Any

from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.convert.families import FAMILIES, KNOWN, OURS, Family, given
from cmt_fast.convert.files import Source
from cmt_fast.safe_pickle.opcodes import shown

OURS_BEGIN = "net."  # every tensor of a network built here (models.build)
# arguments of each project's training script that the scripts before it do not have; the first with one is the file's
ARGUMENTS = (
    ("meanflow", ("ratio_r_not_equal_t", "time_sampler", "cfg_omega", "cfg_kappa")),
    ("repa", ("encoder_depth", "proj_coeff", "enc_type")),
    ("lightningdit", ("model_type", "use_qknorm", "use_swiglu", "use_rmsnorm", "wo_shift")),
    ("sit", ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")),
)


def find(source: Source, wanted: str | None = None) -> Family:
    """The family of a file: that which its tensors and arguments tell, or `wanted` where they leave a choice.

    Raises ConfigError where there is none, where it must be asked for, and where the file itself says that it is not `wanted`.
    """
    if wanted is not None and wanted not in KNOWN:
        raise ConfigError(f"--as: {wanted!r} is not valid; valid are {', '.join(KNOWN)}{nearest(wanted, KNOWN)}")
    if wanted == OURS.name or (
        wanted is None and (source.about.get("cmt") or all(n.startswith(OURS_BEGIN) for n in source.tensors))
    ):
        return OURS
    marked = [f for f in FAMILIES if all(_has(source, mark) for mark in f.marks)]
    if not marked or (wanted and KNOWN[wanted] not in marked):
        first = shown(next(iter(source.tensors)))
        what = f"has not the names of {wanted}" if wanted and marked else "is of no known family"
        hint = _diffusers(source)
        raise ConfigError(
            f"FILE: {str(source.path)!r} {what} (its first tensor is {first!r}{hint}); known are {', '.join(KNOWN)}"
        )
    if len(marked) == 1:
        return marked[0]
    told = _evidence(source)
    if wanted is None and len(told) == 1:
        return KNOWN[next(iter(told))]
    if wanted is None:
        raise ConfigError(
            f"FILE: {str(source.path)!r} {_question(told)}; say which with --as {next(iter(told), 'sit')}"
        )
    if told and wanted not in told:
        says = "; ".join(f"{why} is {name}'s" for name, why in told.items())
        raise ConfigError(f"--as: {str(source.path)!r} is not {wanted}: {says}; leave --as out")
    return KNOWN[wanted]


def _question(told: dict[str, str]) -> str:
    if told:
        return f"could be {' or '.join(told)}: " + ", but ".join(f"{why} is {name}'s" for name, why in told.items())
    return "could be dit or sit (or repa without its projectors), whose tensors have the same names and other meanings"


def _has(source: Source, pattern: str) -> str | None:
    """The first tensor whose name is of the pattern."""
    return next((name for name in source.tensors if re.fullmatch(pattern, name)), None)


def _evidence(source: Source) -> dict[str, str]:
    """Family -> what of the file says so: a tensor that only it has, arguments that only its script has."""
    told = {}
    for family in FAMILIES:
        if name := next(filter(None, (_has(source, pattern) for pattern in family.tells)), None):
            told[family.name] = f"the tensor {shown(name)}"
            break
    args = given(source)
    if by_arguments := _by_arguments(args):
        told.setdefault(*by_arguments)
    model = args.get("model")
    if isinstance(model, str) and re.match(r"DiT-", model):
        told.setdefault("dit", f"the argument model {shown(model)}")
    return told


def _by_arguments(args: dict[str, Any]) -> tuple[str, str] | None:
    for family, keys in ARGUMENTS:
        if found := [key for key in keys if key in args]:
            return family, f"the argument {found[0]} {shown(str(args[found[0]]))}"
    return None


def _diffusers(source: Source) -> str:
    """A word about files in the layout of diffusers, which names the same networks otherwise."""
    if _has(source, r"transformer_blocks\..*"):
        return ": a transformer in the layout of diffusers; take the file that its authors published"
    return ""
