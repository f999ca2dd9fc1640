"""``metrics.jsonl``: one line a step and one a validation, whole lines only, continued after a resume without repeats."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lime_dist.data.files import WholeAppends


class MetricsFile:
    """Appends records to a run's ``metrics.jsonl``.

    Args:
        resumed_step: records after this step come from work that a crash undid; they are removed.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._validated = _trim(path, resumed_step)
        self._file = WholeAppends(path)

    @property
    def waiting(self) -> bool:
        return self._file.waiting

    def write(self, record: dict[str, float | int]) -> None:
        """Append a record; the validation of a step that has one already, when a finished run is started again, is not."""
        if "validation_loss" in record:
            if record["step"] in self._validated:
                return
            self._validated.add(record["step"])
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def flush(self) -> None:
        """Every line goes to the file at once; this tries again what a full disk refused."""
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the records after ``step``: training went back to it."""
        self._file.flush()
        self._validated = _trim(self.path, step)
        self._file.close()
        self._file = WholeAppends(self.path)

    def close(self) -> None:
        self._file.close()


def _trim(path: Path, last: int) -> set[float]:
    """Remove the records after a step, and a line that a crash cut off; the steps that have a validation."""
    if not path.exists():
        return set()
    kept = [line for line in path.read_text().splitlines() if _step(line) <= last]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)
    return {record["step"] for record in map(json.loads, kept) if "validation_loss" in record}


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a crash cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
