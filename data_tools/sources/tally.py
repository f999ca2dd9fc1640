"""Count the rows that a reader meets: all, those without text, those filtered out, and those that cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_tools.sources.filters import Filter
from lime_dist.errors import first_line

LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class Rejection:
    """Rows that cannot be read.

    Attributes:
        row: the first one, counted from 1; 0 for the whole file.
        rows: how many rows are lost; 0 if unknown.
    """

    file: str
    row: int
    reason: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.file}{f' row {self.row}' if self.row else ''}: {self.reason}"


@dataclass
class Tally:
    """Counts of the rows that a reader met.

    Attributes:
        rows: all rows, those counted below included.
        null: rows without a text.
        empty: rows whose text is white space only.
        filtered: rows that do not satisfy the conditions.
        dropped: of each condition, the rows that do not satisfy it. A row may count for several.
        rejected: what could not be read.
    """

    rows: int = 0
    null: int = 0
    empty: int = 0
    filtered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[Rejection] = field(default_factory=list)

    def text_or_none(self, file: str, row: int, value: bytes | None) -> str | None:
        """Return a row's text; if it has no usable one, count the reason and return None."""
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
        """Whether a row's values satisfy all conditions; if not, count the row."""
        wanted, reason = True, ""
        for condition, value in conditions:
            try:
                if not condition.passes(value):
                    self.dropped[str(condition)] += 1
                    wanted = False
            except TypeError as error:
                reason = reason or str(error)
        if not wanted:
            self.filtered += 1
        elif reason:
            self.rejected.append(Rejection(file, row, reason))
        return wanted and not reason


def names(columns: Iterable[str]) -> str:
    """The names of columns, in one line that every file and terminal can hold."""
    listed = (name if name.isprintable() else ascii(name) for name in columns)
    text = ", ".join(listed) or "none"
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def reason_of(error: BaseException) -> str:
    """The first line of an error, short enough for a list of rejections."""
    return first_line(error)[:LONGEST_REASON]
