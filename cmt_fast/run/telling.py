"""`--guidance`: at which scales a trained stage is sampled or judged, and what is said of them.

A network that was told its guidance in training (`model.guided`) is told a scale, or several, and the recipe's interval of
times with each; the ODE solver is guided by a scale (run/guidance.py says where either means something).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cmt_fast.config.errors import ConfigError
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.run import guidance
from cmt_fast.run.workspace import Workspace


def scales(text: str) -> tuple[float, ...]:
    """`1,2,4` as typed. Raises ConfigError for what is no list of numbers, and for a number that stands twice."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--guidance: {text!r} is not a list of scales like 1,2,4") from None
    if len(set(found)) < len(found):
        raise ConfigError(f"--guidance: {text!r} has a scale twice; give each once")
    return found


def at(work: Workspace, stage: str, solver: bool, *scale: float) -> Sampler:
    """How samples of a stage are drawn at this scale; few-step ones also at several, in turn. Raises ConfigError where one means
    nothing: to a network that was told none, or none so large, and to a solver without a null class."""
    for one in scale:
        sampler = dataclasses.replace(work.run.sampler, guidance=one)  # type: ignore[type-var]
        asked = work.place._replace(run=dataclasses.replace(work.run, sampler=sampler))  # type: ignore[type-var]
        guidance.check_asked(asked, stage, solver, work.data.classes)
    if solver and len(scale) > 1:
        raise ConfigError(f"--guidance: {', '.join(f'{w:g}' for w in scale)}: the ODE solver takes one scale at a time")
    return work.setting.guided_by(scale[0]) if solver else work.setting.told(*scale)


def asked(work: Workspace, stage: str, solver: bool, guidance_: float | Sequence[float] | None) -> Sampler:
    """As `at`, the recipe's scale where none is given. Raises ConfigError."""
    if guidance_ is not None:
        return at(work, stage, solver, *([guidance_] if isinstance(guidance_, int | float) else guidance_))
    if solver:
        guidance.check_solver(work.place, stage)
    return work.setting


def said(setting: Sampler, solver: bool) -> str:
    """` at guidance 2`, ` at guidance 1, 2 and 4 in turn`; nothing without."""
    scales = setting.scales or (setting.config.guidance if solver else setting.config.told_guidance[0],)
    if len(scales) == 1:
        return "" if scales[0] == 1 else f" at guidance {scales[0]:g}"
    *first, last = (f"{w:g}" for w in scales)
    return f" at guidance {', '.join(first)} and {last} in turn"


def kept(setting: Sampler, solver: bool) -> float | list[float] | dict[str, list[float]] | None:
    """The same as JSON: the solver's scale; scale and interval that a network is told, or all scales; None where it is none."""
    omega, *interval = setting.config.told_guidance
    if solver:
        return setting.config.guidance
    if setting.scales:
        return {"in_turn": list(setting.scales), "interval": interval}
    return None if omega == 1 else [omega, *interval]
