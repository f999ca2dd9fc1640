"""``metrics.jsonl``: one line a step and one a validation, whole lines only, continued after a resume without repeats."""

from __future__ import annotations

import json
import os
from pathlib import Path


class MetricsFile:
    """Appends records to a run's ``metrics.jsonl``.

    Args:
        resumed_step: records after this step come from work that a crash undid; they are removed.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._validated: set[float] = set()
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            records = map(json.loads, kept)
            self._validated = {record["step"] for record in records if "validation_loss" in record}
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, path)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, float | int]) -> None:
        """Append a record; the validation of a step that has one already, when a finished run is started again, is not."""
        if "validation_loss" in record:
            if record["step"] in self._validated:
                return
            self._validated.add(record["step"])
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Nothing to do: every line goes to the file at once."""

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a crash cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
