"""Writes a run's TensorBoard events on rank 0; flushed at every validation and checkpoint.

torch's ``SummaryWriter`` writes from a thread, which dies with a traceback when the disk is full. Here the caller appends
whole events and sees the error.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar, text

from lime_dist.config.flat import flattened
from lime_dist.data.files import WholeAppends
from lime_dist.monitor.tags import TAGS, scalars

FLUSH_SECONDS = 60.0
"""Scalars are flushed at least this often, so that one can follow a run."""

LAYOUT = {
    "loss": {
        "training and validation": ["Multiline", ["train/loss", r"validation/(.+/)?loss"]],
        "learning rates": ["Multiline", ["train/learning_rate", "train/router_learning_rate"]],
    },
    "training": {
        "gradient norm": ["Multiline", ["train/gradient_norm"]],
        "computation of the slowest rank over the median": ["Multiline", ["speed/slowest_over_median"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_second"]],
        "share of the devices' peak": ["Multiline", ["speed/mfu"]],
    },
    "stages": {
        title: ["Multiline", [rf"stage\d+/{name}"]]
        for title, name in {
            "bubble": "bubble", "waiting, seconds per step": "waiting_seconds", "memory, bytes": "memory_bytes",
            "gradient norm": "gradient_norm",
        }.items()
    },
    "boundaries": {"bytes per step": ["Multiline", [r"boundary\d+/bytes_there", r"boundary\d+/bytes_back"]]},
    "layers": {
        "self-retrieval": ["Multiline", [r"self_retrieval/layer\d+"]],
        "entropy, nats": ["Multiline", [r"entropy/layer\d+"]],
    },
}  # fmt: skip
"""Charts of the custom scalars tab; their tags are regular expressions."""
COLUMNS = (
    "model.architecture", "model.hidden_size", "model.lime.history.policy", "model.lime.routes", "model.num_hidden_layers",
    "optimizer.lr", "optimizer.name", "optimizer.router_lr", "optimizer.warmup_steps", "optimizer.weight_decay",
    "parallel.pipeline_stages", "precision", "train.global_batch_size", "train.seed", "train.steps",
)  # fmt: skip
"""Settings that are columns of the table of runs, in the order in which TensorBoard sorts them. The others would come before."""


class TensorBoardLog:
    """Appends scalars, pictures and the configuration to a new event file.

    Args:
        config_text: the configuration as YAML.
        resumed_step: the step that the run resumes from; later events of earlier starts are hidden.
    """

    required = True

    def __init__(self, directory: Path, config_text: str, resumed_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{resumed_step}"
        self.path = directory / name
        self._file = WholeAppends(self.path)
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._add(Event(file_version="brain.Event:2"))
        self.rewind(resumed_step)
        settings = _settings(config_text)
        columns = {key: settings[key] for key in COLUMNS if key in settings}
        experiment, _, _ = hparams(columns, {TAGS["validation_loss"]: None})
        _, start, _ = hparams(settings, {TAGS["validation_loss"]: None})
        for summary in (text("config", f"```yaml\n{config_text}```"), custom_scalars(LAYOUT), experiment, start):
            self._add(Event(summary=summary, step=resumed_step))

    @property
    def waiting(self) -> bool:
        """Whether some events are not on disk yet."""
        return self._file.waiting

    def write(self, record: dict[str, float | int]) -> None:
        for tag, value in scalars(record).items():
            self._add(Event(summary=scalar(tag, value), step=int(record["step"])))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        for summary in [*(scalar(tag, value) for tag, value in scalars.items()), *pictures]:
            self._add(Event(summary=summary, step=step))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        shown = "\n".join(f"{as_code(prompt)}goes on with\n{as_code(written)}" for prompt, written in texts.items())
        self._add(Event(summary=text("samples", shown), step=step))

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Hide the events after ``step``, which training went back to."""
        self._add(Event(session_log=SessionLog(status=SessionLog.START), step=step + 1))

    def close(self) -> None:
        self._file.flush()
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def as_code(written: str) -> str:
    """Text as Markdown shows it unchanged."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", written))]))
    return f"\n{fence}\n{written}\n{fence}\n"


def _settings(config_text: str) -> dict[str, float | str | bool]:
    """The configuration by dotted key, for TensorBoard's table of runs. Lists and null become text."""
    values = flattened(yaml.safe_load(config_text))
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}
