"""Where the records of a run go, and what becomes of them when the disk is full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.summary_pb2 import Summary

Record = dict[str, float | int]


class RecordSink(Protocol):
    """Something that keeps records: ``metrics.jsonl``, TensorBoard. What cannot be written (OSError) is tried again later."""

    path: Path

    @property
    def waiting(self) -> bool:
        """Whether something of it is not on disk yet."""
        ...

    def write(self, record: Record) -> None: ...

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary]) -> None:
        """What only something with charts has a place for: more scalars, by tag, and pictures."""
        ...

    def flush(self) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class Records:
    """All sinks of this rank; none on most."""

    def __init__(self, sinks: Sequence[RecordSink] = ()) -> None:
        self._sinks = sinks
        self._problems: dict[Path, str] = {}

    @property
    def problem(self) -> str | None:
        """Why records do not reach the disk, in one line; None: they do."""
        return next(iter(self._problems.values()), None)

    def write(self, record: Record) -> None:
        self._all(lambda sink: sink.write(record))

    def draw(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Summary] = ()) -> None:
        self._all(lambda sink: sink.draw(step, scalars, pictures))

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
        for sink in self._sinks:
            try:
                action(sink)
            except OSError as error:
                self._problems.setdefault(sink.path, f"{sink.path} cannot be written: {error}")
            else:
                if not sink.waiting:
                    self._problems.pop(sink.path, None)
