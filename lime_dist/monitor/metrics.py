"""``metrics.jsonl``: one line per step and one per validation. It has whole lines only, and a resume repeats none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.data.files import WholeAppends

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class MetricsFile:
    """Appends records to a run's ``metrics.jsonl``.

    Args:
        resumed_step: the step that the run resumes from; later records are removed, because a crash undid their steps.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._validations = _trim(path, resumed_step)
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
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        """Do nothing: ``metrics.jsonl`` has neither pictures nor the scalars of single stages."""

    def best_validation(self) -> tuple[float, float] | None:
        """(loss, step) of the lowest validation loss over all starts of this run; None: there was no validation."""
        return min(((loss, step) for step, loss in self._validations.items()), default=None)

    def flush(self) -> None:
        """Try again to write the lines that a full disk refused. (All others have been written at once.)"""
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the records after ``step``, which training went back to."""
        self._file.flush()
        self._validations = _trim(self.path, step)
        self._file.close()
        self._file = WholeAppends(self.path)

    def close(self) -> None:
        self._file.close()


def without_clock(record: dict[str, float | int]) -> dict[str, float | int]:
    """A record without its timings. Without them, two runs of the same work have equal records."""
    timings = ("step_seconds", "tokens_per_second", "mfu")
    return {key: value for key, value in record.items() if key not in timings and not key.startswith("seconds_")}


def _trim(path: Path, last: int) -> dict[float, float]:
    """Remove the records after step ``last`` and a truncated line; returns the validation losses that stay, by step."""
    if not path.exists():
        return {}
    kept = [line for line in path.read_text().splitlines() if _step(line) <= last]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)
    records = map(json.loads, kept)
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def _step(line: str) -> float:
    """The step of a line; infinity for a truncated line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
