"""MLflow, on the server or in the folder that ``MLFLOW_TRACKING_URI`` names."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.config.flat import flat_config, shown
from lime_dist.config.registry import SINKS
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, first_line
from lime_dist.monitor.sinks.base import FINISH_SECONDS, images_in, package, refusals, scalars_in
from lime_dist.monitor.tags import scalars

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""The package's own settings have a run wait for minutes at its start if the server is away."""
PARAMETERS = 100
"""Parameters that a server takes at a time."""


@SINKS.register("mlflow")
class MLflow:
    """A run in the experiment ``monitor.project``, named like the run folder; every start of a run continues it.

    Threads of the package send everything, so that training does not wait for the network. What was sent cannot be removed: after a
    way back, a curve has both courses.

    Args:
        directory: the run folder.

    Raises:
        LimeError: the package is missing, or the server refuses.
    """

    required = waiting = False

    def __init__(self, directory: Path, config: Config) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        self._mlflow = mlflow = package("mlflow", "mlflow")
        self._entities = mlflow.entities
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.path = directory / "mlflow-run"
        try:
            self._client = mlflow.MlflowClient()
            self._run = self._continued() or self._begun(directory, config)
            self.path.write_text(f"{self._run}\n")
        except mlflow.exceptions.MlflowException as error:
            raise LimeError(f"monitor.sinks: mlflow: {first_line(error)}; check MLFLOW_TRACKING_URI") from None
        self.note = f"MLflow: run {self._run} at {mlflow.get_tracking_uri()}"

    def _continued(self) -> str | None:
        """The id of the run that an earlier start began, which runs again."""
        if not self.path.exists():
            return None
        known = self.path.read_text().strip()
        self._client.update_run(known, status="RUNNING")
        return known

    def _begun(self, directory: Path, config: Config) -> str:
        project = config.monitor.project
        experiment = self._client.get_experiment_by_name(project)
        number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        run: str = self._client.create_run(number, run_name=directory.absolute().name).info.run_id
        settings = [self._entities.Param(key, shown(value)) for key, value in flat_config(config).items()]
        for begin in range(0, len(settings), PARAMETERS):
            self._client.log_batch(run, params=settings[begin : begin + PARAMETERS])
        return run

    def write(self, record: dict[str, float | int]) -> None:
        self._send(int(record["step"]), scalars(record))

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        self._send(step, scalars_in(scalars, pictures))
        with refusals():
            for tag, image in images_in(pictures):
                self._client.log_image(self._run, image, key=tag, step=step, synchronous=False)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(tag, value, now, step) for tag, value in values.items()]
        with refusals():
            self._client.log_batch(self._run, metrics=metrics, synchronous=False)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        with refusals():
            self._client.log_dict(self._run, dict(texts), f"samples/step{step}.json")

    def flush(self) -> None:
        """Do nothing: the package sends by itself."""

    def rewind(self, step: int) -> None:
        """Do nothing: what was sent cannot be removed."""

    def close(self) -> None:
        """Wait until everything is sent, at most `FINISH_SECONDS`."""
        thread = threading.Thread(target=self._finish, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)

    def _finish(self) -> None:
        with suppress(Exception):  # the server is away; what it lacks is in metrics.jsonl
            self._mlflow.flush_async_logging()
            self._client.set_terminated(self._run)
