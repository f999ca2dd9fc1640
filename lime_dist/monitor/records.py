"""Where the records of a run go, and what becomes of them when the disk is full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

Record = dict[str, float | int]


class RecordSink(Protocol):
    """Something that keeps records: ``metrics.jsonl``, TensorBoard. What cannot be written (OSError) is tried again later."""

    path: Path

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class Records:
    """All sinks of this rank; none on most.

    Attributes:
        problem: why the newest record is not on disk, in one line; None: it is.
    """

    def __init__(self, sinks: Sequence[RecordSink] = ()) -> None:
        self._sinks = sinks
        self.problem: str | None = None

    def write(self, record: Record) -> None:
        self._all(lambda sink: sink.write(record))

    def flush(self) -> None:
        self._all(lambda sink: sink.flush())

    def rewind(self, step: int) -> None:
        """Forget the records after ``step``: training went back to it."""
        self._all(lambda sink: sink.rewind(step))

    def close(self) -> None:
        self.flush()
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink.close()

    def _all(self, action: Callable[[RecordSink], None]) -> None:
        self.problem = None
        for sink in self._sinks:
            try:
                action(sink)
            except OSError as error:
                self.problem = f"{sink.path} cannot be written: {error}"
