"""``metrics.jsonl``: one line per step, per validation, and per sample of texts. It has whole lines only, and a resume repeats none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.data.files import WholeAppends, read_json_lines, write_atomic

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class MetricsFile:
    """Appends records to a run's ``metrics.jsonl``.

    Args:
        resumed_step: the step that the run resumes from; later records are removed, because a crash undid their steps.

    Attributes:
        damaged: number of lines that a crash left unreadable; they are removed.
    """

    required = True

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._validations, self.damaged = _trim(path, resumed_step)
        self._file = WholeAppends(path)

    @property
    def waiting(self) -> bool:
        """Whether some lines are not on disk yet."""
        return self._file.waiting

    def write(self, record: dict[str, float | int]) -> None:
        """Append a record. A second validation of a step, when a finished run is started again, is dropped."""
        if "validation_loss" in record:
            if record["step"] in self._validations:
                return
            self._validations[record["step"]] = record["validation_loss"]
        self._append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        """Do nothing: ``metrics.jsonl`` has neither pictures nor the scalars of single stages."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._append({"step": step, "sample_texts": dict(texts)})

    def best_validation(self) -> tuple[float, float] | None:
        """(loss, step) of the lowest validation loss over all starts of this run; None: there was no validation."""
        return min(((loss, step) for step, loss in self._validations.items()), default=None)

    def flush(self) -> None:
        """Try again to write the lines that a full disk refused. (All others have been written at once.)"""
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the records after ``step``, which training went back to."""
        self._file.flush()
        self._validations, _ = _trim(self.path, step)
        self._file.close()
        self._file = WholeAppends(self.path)

    def close(self) -> None:
        self._file.close()


def without_clock(record: dict[str, float | int]) -> dict[str, float | int]:
    """A record without its time and timings. Without them, two runs of the same work have equal records."""
    timings = ("time", "step_seconds", "tokens_per_second", "mfu")
    return {key: value for key, value in record.items() if key not in timings and not key.startswith("seconds_")}


def is_record(value: dict[str, Any]) -> bool:
    """Whether a JSON object is a record: it has a whole ``step``, and a loss in it is a number."""
    losses = [value[key] for key in ("loss", "validation_loss") if key in value]
    return type(value.get("step")) is int and all(type(loss) in (int, float) for loss in losses)


def _trim(path: Path, last: int) -> tuple[dict[float, float], int]:
    """Remove the records after step ``last`` and unreadable lines.

    Returns:
        The validation losses that stay, by step; and the number of unreadable lines.
    """
    if not path.exists():
        return {}, 0
    lines, damaged = read_json_lines(path)
    records = [(line, record) for line, record in lines if is_record(record)]
    damaged += len(lines) - len(records)
    kept = [(line, record) for line, record in records if record["step"] <= last]
    write_atomic(path, b"".join(line + b"\n" for line, _ in kept))
    return {record["step"]: record["validation_loss"] for _, record in kept if "validation_loss" in record}, damaged
