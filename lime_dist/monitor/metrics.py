"""``metrics.jsonl``: one line a step and one a validation, whole lines only, continued after a resume without repeats."""

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
        resumed_step: records after this step come from work that a crash undid; they are removed.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._validations = _trim(path, resumed_step)
        self._file = WholeAppends(path)

    @property
    def waiting(self) -> bool:
        return self._file.waiting

    def write(self, record: dict[str, float | int]) -> None:
        """Append a record; the validation of a step that has one already, when a finished run is started again, is not."""
        if "validation_loss" in record:
            if record["step"] in self._validations:
                return
            self._validations[record["step"]] = record["validation_loss"]
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        """Not here: these lines are what runs are compared by."""

    def best_validation(self) -> tuple[float, float] | None:
        """The lowest validation loss and its step, of all starts of this run; None: there is none."""
        best = min(((loss, step) for step, loss in self._validations.items()), default=None)
        return best

    def flush(self) -> None:
        """Every line goes to the file at once; this tries again what a full disk refused."""
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the records after ``step``: training went back to it."""
        self._file.flush()
        self._validations = _trim(self.path, step)
        self._file.close()
        self._file = WholeAppends(self.path)

    def close(self) -> None:
        self._file.close()


def without_clock(record: dict[str, float | int]) -> dict[str, float | int]:
    """A record without what the clock decides: two runs of the same work have the same rest."""
    clock = ("step_seconds", "tokens_per_second", "mfu")
    return {key: value for key, value in record.items() if key not in clock and not key.startswith("seconds_")}


def _trim(path: Path, last: int) -> dict[float, float]:
    """Remove the records after a step, and a line that a crash cut off; validation losses by step."""
    if not path.exists():
        return {}
    kept = [line for line in path.read_text().splitlines() if _step(line) <= last]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)
    records = map(json.loads, kept)
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a crash cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
