"""MLflow: a run for each stage, images as the step.

Where it is kept and in what experiment say the variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (or _ID). The run's
id is kept in STAGE/loggers.json, so a stage that is started again goes on in the same run. MLflow cannot take back what a
kill undid; the same steps are trained again to the same numbers, and are not sent twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmt_fast.storage.loggers import Opening, environment, keep_id, known_id

FILES, URI = "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI"
NAME, LONGEST, AT_ONCE = (
    "mlflow",
    500,
    100,
)  # characters of a parameter and parameters of a call that every server takes


def open_logger(about: Opening) -> Board:
    """Raises what the library raises: no server, an experiment that is not there; of a store that it refuses, what to set."""
    try:
        return Board(about)
    except Exception as error:
        if FILES not in str(error) and "sqlalchemy" not in str(error):
            raise
        where = environment(URI)
        named = f"is {where!r}" if where else "is not set, so runs would be kept here"
        raise RuntimeError(
            f"{URI} {named}, and MLflow refuses: it keeps runs in files only with {FILES}=true, in a database only as the "
            "whole `pip install mlflow`; or name a server"
        ) from error


class Board:
    """One stage's run at MLflow."""

    def __init__(self, about: Opening) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self.mlflow, self.metric, self.client = mlflow, Metric, mlflow.MlflowClient()
        known = known_id(about.folder, NAME)
        self.fresh = known is None
        self.after = -1 if self.fresh else about.before_nimg + about.seen_nimg  # what is sent already
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        tags = {"stage": about.stage, "run": about.run}
        run = self.client.create_run(self._experiment(), run_name=f"{about.run} {about.stage}", tags=tags)
        self.id = run.info.run_id
        keep_id(about.folder, NAME, self.id)
        params = [Param(key, str(value)[:LONGEST]) for key, value in leaves(about.settings)]
        for i in range(0, len(params), AT_ONCE):
            self.client.log_batch(self.id, params=params[i : i + AT_ONCE])

    def _experiment(self) -> str:
        """The id of the experiment that the surroundings name, which is made where it is not there yet."""
        given, name = environment("MLFLOW_EXPERIMENT_ID"), environment("MLFLOW_EXPERIMENT_NAME") or "Default"
        if given:
            return given
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def scalars(self, at: int, values: dict[str, float], when: float) -> None:
        if at > self.after:
            rows = [self.metric(name, value, int(1000 * when), at) for name, value in values.items()]
            self.client.log_batch(self.id, metrics=rows)

    def picture(self, at: int, name: str, path: Path, caption: str, when: float) -> None:
        if at > self.after:
            self.client.log_image(self.id, self.mlflow.Image(str(path)), key=name, step=at, timestamp=int(1000 * when))

    def close(self, whole: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if whole else "KILLED")


def leaves(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings; what is empty is left out."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value
