"""Weights & Biases. ``WANDB_MODE=offline`` writes into the run folder only, for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.config.registry import SINKS
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, first_line
from lime_dist.monitor.sinks.base import FINISH_SECONDS, images_in, package, refusals, scalars_in
from lime_dist.monitor.tags import scalars

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


@SINKS.register("wandb")
class WeightsAndBiases:
    """A run in the project ``monitor.project``, named like the run folder; every start of a run continues it.

    A process of the package sends everything, so that training does not wait for the network. What was sent cannot be removed: after
    a way back, a curve has both courses.

    Args:
        directory: the run folder.

    Raises:
        LimeError: the package is missing, or nobody is logged in.
    """

    required = waiting = False

    def __init__(self, directory: Path, config: Config) -> None:
        self._wandb = package("wandb", "wandb")
        self.path = directory / "wandb"
        self.path.mkdir(exist_ok=True)
        id_file = self.path / "id"
        known = id_file.read_text().strip() if id_file.exists() else None
        settings = self._wandb.Settings(
            silent=True, console="off", finish_timeout=FINISH_SECONDS, finish_timeout_raises=False
        )
        try:
            self._run = self._wandb.init(
                project=config.monitor.project, name=directory.absolute().name, dir=directory, id=known, resume="allow",
                config=config.model_dump(mode="json"), settings=settings,
            )  # fmt: skip
        except self._wandb.Error as error:
            raise LimeError(
                f"monitor.sinks: wandb: {first_line(error)}; call wandb login, or set WANDB_MODE=offline"
            ) from None
        id_file.write_text(f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")
        self.note = f"Weights & Biases: {self._run.url or self._run.dir}"

    def write(self, record: dict[str, float | int]) -> None:
        with refusals():
            self._run.log({"step": record["step"], **scalars(record)})

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        with refusals():
            images: dict[str, Any] = {tag: self._wandb.Image(image) for tag, image in images_in(pictures)}
            self._run.log({"step": step, **scalars_in(scalars, pictures), **images})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        with refusals():
            table = self._wandb.Table(columns=["prompt", "continuation"], data=[list(pair) for pair in texts.items()])
            self._run.log({"step": step, "samples": table})

    def flush(self) -> None:
        """Do nothing: the package sends by itself."""

    def rewind(self, step: int) -> None:
        """Do nothing: what was sent cannot be removed."""

    def close(self) -> None:
        with refusals():
            self._run.finish()
