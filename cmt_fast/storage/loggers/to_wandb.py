"""Weights & Biases: a run for each stage, all in one group, images as the axis.

Project, entity, key and mode are those of the variables WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY, WANDB_MODE. The run's id
is kept in STAGE/loggers.json, so a stage that is started again goes on in the same curves. W&B cannot take back what a
kill undid; the same steps are trained again to the same numbers, and are not sent twice.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from cmt_fast.storage.loggers import Opening, environment, keep_id, known_id

NAME, AXIS = "wandb", "images"


def open_logger(about: Opening) -> Board:
    """Raises what the library raises: no key, no network."""
    return Board(about)


class Board:
    """One stage's run at W&B."""

    def __init__(self, about: Opening) -> None:
        import wandb

        self.wandb = wandb
        known = known_id(about.folder, NAME)
        self.fresh = known is None
        self.after = -1 if self.fresh else about.before_nimg + about.seen_nimg  # what is sent already
        offline = (environment("WANDB_MODE") or "").lower() in ("offline", "dryrun", "disabled")
        more: dict[str, Any] = {} if offline else {"resume": "allow"}  # which it would only warn about
        if not environment("WANDB_DIR"):
            more["dir"] = str(about.folder.parent)
        self.run = wandb.init(
            id=known or secrets.token_hex(4),
            name=f"{about.run} {about.stage}",
            group=about.run,
            job_type=about.stage,
            config=about.settings,
            settings=wandb.Settings(console="off", silent=True),
            **more,
        )
        if self.fresh:
            keep_id(about.folder, NAME, self.run.id)
        self.run.define_metric(AXIS, hidden=True)
        self.run.define_metric("*", step_metric=AXIS)

    def scalars(self, at: int, values: dict[str, float], when: float) -> None:
        if at > self.after:
            self.run.log({**values, AXIS: at})

    def picture(self, at: int, name: str, path: Path, caption: str, when: float) -> None:
        if at > self.after:
            self.run.log({name: self.wandb.Image(str(path), caption=caption), AXIS: at})

    def close(self, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)
