"""TensorBoard scalars of a run, written by rank 0 and flushed at every validation and checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/gradient_norm",
    "lr": "train/learning_rate",
    "router_lr": "train/router_learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "validation_loss": "validation/loss",
}
"""TensorBoard tag of each key of a ``metrics.jsonl`` record that is drawn."""


class TensorBoardLog:
    """Scalars against steps; ``resumed_step`` hides what an interrupted run wrote after its last checkpoint."""

    def __init__(self, directory: Path, config_text: str, resumed_step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)
        self._writer.add_text("config", f"```yaml\n{config_text}```", resumed_step)

    def write(self, record: dict[str, float | int]) -> None:
        for key, tag in TAGS.items():
            if key in record:
                self._writer.add_scalar(tag, record[key], int(record["step"]))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
