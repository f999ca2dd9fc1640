"""The records of a run: writes them to all sinks, and tries again when a disk is full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.summary_pb2 import Summary

Record = dict[str, float | int]


class RecordSink(Protocol):
    """A place for records: ``metrics.jsonl``, TensorBoard.

    A method raises OSError if the disk refuses; the sink keeps what it could not write and tries again later.

    Attributes:
        required: whether the run needs these records. A dashboard elsewhere is not: it loses what it refuses, and ends no run.
    """

    path: Path
    required: bool

    @property
    def waiting(self) -> bool:
        """Whether some records are not on disk yet."""
        ...

    def write(self, record: Record) -> None: ...

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        """Add scalars by tag, and pictures. A sink without charts ignores them."""
        ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Add sample texts, by prompt."""

    def flush(self) -> None: ...

    def rewind(self, step: int) -> None:
        """Remove or hide the records after ``step``, which training went back to."""
        ...

    def close(self) -> None: ...


class Records:
    """Writes to all sinks of this rank. Rank 0 has them all; the other ranks have none."""

    def __init__(self, sinks: Sequence[RecordSink] = ()) -> None:
        self._sinks = sinks
        self._problems: dict[Path, str] = {}

    @property
    def problem(self) -> str | None:
        """Why records cannot be written, in one line; None: they can."""
        return next(iter(self._problems.values()), None)

    @property
    def fatal(self) -> str | None:
        """The problem of a sink that the run needs, in one line; None: there is none."""
        return next(
            (self._problems[sink.path] for sink in self._sinks if sink.required and sink.path in self._problems), None
        )

    def write(self, record: Record) -> None:
        self._all(lambda sink: sink.write(record))

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary] = ()) -> None:
        self._all(lambda sink: sink.draw(step, scalars, pictures))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._all(lambda sink: sink.write_texts(step, texts))

    def flush(self) -> None:
        self._all(lambda sink: sink.flush(), [sink for sink in self._sinks if sink.required])

    def rewind(self, step: int) -> None:
        """Remove the records after ``step``, which training went back to."""
        self._all(lambda sink: sink.rewind(step))

    def close(self) -> None:
        self.flush()
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink.close()

    def _all(self, action: Callable[[RecordSink], None], sinks: Sequence[RecordSink] | None = None) -> None:
        for sink in self._sinks if sinks is None else sinks:
            try:
                action(sink)
            except OSError as error:
                self._problems.setdefault(sink.path, f"{sink.path} cannot be written: {error}")
            else:
                if not sink.waiting:
                    self._problems.pop(sink.path, None)
