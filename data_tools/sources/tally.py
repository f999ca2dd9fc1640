"""What a reader counts: rows, those without text, those that conditions exclude, and those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_tools.sources.filters import Filter


@dataclass(frozen=True)
class Rejection:
    """What could not be read: ``row`` counts from 1 (0: the whole file), ``rows`` are lost with it (0: unknown)."""

    file: str
    row: int
    reason: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.file}{f' row {self.row}' if self.row else ''}: {self.reason}"


@dataclass
class Tally:
    """What a reader met: ``rows`` in all; among them those without text (``null``; ``empty``: white space only), those that
    conditions left out (``filtered``), and rejections."""

    rows: int = 0
    null: int = 0
    empty: int = 0
    filtered: int = 0
    rejected: list[Rejection] = field(default_factory=list)

    def text_or_none(self, file: str, row: int, value: bytes | None) -> str | None:
        """Give a row's text, or count why it has none that can be used."""
        if value is None:
            self.null += 1
            return None
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            self.rejected.append(Rejection(file, row, f"not UTF-8 (byte {error.start} of the text)"))
            return None
        if not text.strip():
            self.empty += 1
            return None
        return text

    def wanted(self, file: str, row: int, conditions: Iterator[tuple[Filter, Any]]) -> bool:
        """Whether a row's values fulfil all conditions; counts it if not."""
        try:
            if all(condition.passes(value) for condition, value in conditions):
                return True
            self.filtered += 1
        except TypeError as error:
            self.rejected.append(Rejection(file, row, str(error)))
        return False


def first_line(error: BaseException) -> str:
    """An error's first line, which is all that belongs in a list of rejections."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
