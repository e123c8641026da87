"""What the keys of an objective may not be together with the run around it: `check(config, setting)` of each module that has such
rules, asked by `cmt_fast.run.validation` before a run begins. A key's own bounds are in the schema.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cmt_fast.config.errors import ConfigError


class Setting(NamedTuple):
    """What of a run the rules read.

    stage: its name; rows: the objective's own of a batch, without an anchor's; path: "ve" or "linear"; t_max: where sampling
    begins; label_dropout: a share of rows; classes: of the data, 0 without labels; loader: the kind of what feeds the data.
    """

    stage: str
    rows: int
    path: str
    t_max: float = 0.0
    label_dropout: float = 0.0
    classes: int = 0
    loader: str = "torch"

    @property
    def key(self) -> str:
        """Where the objective's keys stand."""
        return f"{self.stage}.objective"


def none(config: Any, setting: Setting) -> None:
    """Of an objective without rules of its own."""


def velocity_is_learned(config: Any, setting: Setting) -> None:
    """Some rows have r = t where nothing else says what the velocity is. Raises ConfigError where none has."""
    if round(config.ratio * setting.rows) == setting.rows:
        raise ConfigError(
            f"{setting.key}.ratio: {config.ratio} leaves no row with r = t, which alone say what the velocity is; published: 0.25"
        )


def guided_once(config: Any, setting: Setting) -> None:
    """omega and kappa guide the data's velocity. Raises ConfigError where the velocity is the teacher's."""
    if config.velocity == "teacher" and (config.omega, config.kappa) != (1, 0):
        what = f"omega: {config.omega}" if config.omega != 1 else f"kappa: {config.kappa}"
        raise ConfigError(
            f"{setting.key}.{what} guides the data's velocity, and this is the teacher's; take {setting.stage}.teacher_guidance"
        )


def whole_sets(config: Any, setting: Setting) -> None:
    """Sets of `group` rows fill a batch. Raises ConfigError."""
    if setting.rows % config.group:
        raise ConfigError(
            f"{setting.key}.group: {config.group} rows are a set, and the objective's {setting.rows} rows of a batch are no "
            f"multiple of it; take a group that divides {setting.rows}, or another batch or anchor.fraction"
        )
