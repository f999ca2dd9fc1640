"""TensorBoard scalars of a run, written by rank 0 and flushed at every validation and checkpoint.

torch's ``SummaryWriter`` writes from a thread, which a full disk ends with a traceback; here events are appended as whole
records by the caller, who sees what goes wrong.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from lime_dist.data.files import WholeAppends

FLUSH_SECONDS = 60.0
"""Scalars reach the file at the latest after so long, for somebody who watches."""

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
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{resumed_step}"
        self.path = directory / name
        self._file = WholeAppends(self.path)
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._add(Event(file_version="brain.Event:2"))
        self.rewind(resumed_step)
        self._add(Event(summary=text("config", f"```yaml\n{config_text}```"), step=resumed_step))

    @property
    def waiting(self) -> bool:
        return self._file.waiting

    def write(self, record: dict[str, float | int]) -> None:
        for key, tag in TAGS.items():
            if key in record:
                self._add(Event(summary=scalar(tag, record[key]), step=int(record["step"])))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Hide what was written after ``step``: training went back to it."""
        self._add(Event(session_log=SessionLog(status=SessionLog.START), step=step + 1))

    def close(self) -> None:
        self._file.flush()
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
