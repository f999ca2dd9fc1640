"""Conditions on the other columns of a document: ``score>=3``, ``language=en``, ``metadata.token_count<4096``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lime_dist.errors import LimeError

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
WHERE_HELP = (
    "use only documents that satisfy this condition, for example 'score>=3', 'token_count>=64', 'language=en', "
    "'metadata.int_score!=0'; may be repeated; a null satisfies no condition"
)
_CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*")


@dataclass(frozen=True)
class Filter:
    """``column comparison value``; ``column`` may be a field of a struct (``metadata.score``)."""

    column: str
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, condition: str) -> Filter:
        """Parse a condition from the command line.

        Raises:
            LimeError: the text is not a condition.
        """
        match = _CONDITION.fullmatch(condition)
        if match is None or not match[3]:
            raise LimeError(f"--where {condition!r}: not a condition; give COLUMN>=VALUE (or <=, >, <, =, !=)")
        column, comparison, text = match.groups()
        try:
            value: float | str = float(text)
        except ValueError:
            value = text
        if isinstance(value, str) and comparison not in ("=", "!="):
            raise LimeError(f"--where {condition!r}: {comparison} compares numbers, but {text!r} is not a number")
        return cls(column, comparison, value)

    def passes(self, value: Any) -> bool:
        """Whether a document with this value in the column is used.

        Raises:
            TypeError: the value has another type than the filter's.
        """
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(self.value, float) else str):
            raise TypeError(
                f"column {self.column!r} holds {type(value).__name__}, which {self} cannot be compared with"
            )
        return COMPARISONS[self.comparison](value, self.value)

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return f"{self.column}{self.comparison}{value}"


def nested(record: Any, column: str) -> Any:
    """Return the value of a column in a record; ``column`` is a name or a dotted path.

    Raises:
        KeyError: the record has no such column.
    """
    value = record
    if column in record:
        return record[column]
    for part in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            raise KeyError(column)
        value = value[part]
    return value
