"""Conditions on the other columns of a document: ``score>=3``, ``language == "en"``, ``metadata.token_count<4096``."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from enum import Enum
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
MISSPELLED = {"=>": ">=", "=<": "<=", "<>": "!=", "=!": "!=", "===": "==", "!==": "!="}
WHERE_HELP = (
    "use only documents that satisfy this condition, for example 'score>=3', 'language=en', 'source != \"web crawl\"', "
    "'metadata.int_score!=0', 'url!=null'; may be repeated; a null satisfies none but =null"
)
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_CONDITION = re.compile(rf"\s*({_QUOTED}|[^<>=!~\s\"']+)\s*([<>=!~]+)\s*(.*?)\s*", re.DOTALL)
_WORDS: dict[str, bool | None] = {"null": None, "true": True, "false": False}


class Kind(Enum):
    """What a column holds; the value says it in words."""

    TEXT = "text"
    NUMBER = "numbers"
    TRUTH = "true and false"
    DATE = "dates"
    NULL = "nulls"
    OTHER = "values of another type"

    @classmethod
    def of(cls, value: Any) -> Kind:
        """The kind of a value of a row."""
        if value is None:
            return cls.NULL
        types = (
            (bool, cls.TRUTH),  # before numbers, as bool is an int
            ((int, float, Decimal), cls.NUMBER),
            (str, cls.TEXT),
            (date, cls.DATE),
        )
        return next((kind for python_type, kind in types if isinstance(value, python_type)), cls.OTHER)


@dataclass(frozen=True)
class Filter:
    """``column comparison value``; ``column`` may be a field of a struct (``metadata.score``).

    Attributes:
        value: a text, a number, a truth value, or None for null.
        quoted: whether a text was given in quotation marks.
    """

    column: str
    comparison: str
    value: float | str | bool | None
    quoted: bool = False

    @classmethod
    def parse(cls, condition: str) -> Filter:
        """Parse a condition from the command line.

        Raises:
            LimeError: the text is not a condition.
        """
        match = _CONDITION.fullmatch(condition)
        if match is None or not match[3]:
            raise LimeError(f"--where {condition!r}: not a condition; give COLUMN>=VALUE (or <=, >, <, =, ==, !=)")
        column, sign, text = match.groups()
        comparison = "=" if sign == "==" else sign
        if comparison not in COMPARISONS:
            known = MISSPELLED.get(sign, "one of " + ", ".join([*COMPARISONS, "=="]))
            raise LimeError(
                f"--where {condition!r}: {sign} is no comparison; write {known}, and quote a value like {text!r}"
            )
        if column[0] in "\"'":
            column = _unquoted(column, condition)
        if text[0] in "\"'":
            return cls(column, comparison, _unquoted(text, condition), quoted=True)
        if re.search("[<>=!]", text):
            raise LimeError(
                f"--where {condition!r}: the value {text!r} holds a comparison; give each condition its own --where, or quote "
                "the value"
            )
        value = _WORDS[text] if text in _WORDS else _number_or_text(text)
        if comparison not in ("=", "!=") and (value is None or isinstance(value, bool)):
            raise LimeError(f"--where {condition!r}: {text} is not larger or smaller than anything; use = or !=")
        return cls(column, comparison, value)

    def mismatch(self, kind: Kind, type_name: str) -> str:
        """Why a column of this kind cannot be compared with the value, and what to write; "" if it can.

        Args:
            type_name: the column's type, in the file's words.
        """
        wanted, holds = Kind.of(self.value), f"column {self.column!r} holds {type_name}"
        if Kind.NULL in (kind, wanted) or kind is wanted or (kind is Kind.TEXT and wanted is Kind.TRUTH):
            return ""
        if kind is Kind.TEXT:
            return f"{holds}; write {self.column}{self.comparison}'{self._text()}' to compare it with a text"
        if kind is Kind.DATE and isinstance(self.value, str):
            return "" if _moment(self.value) else f"{holds}; give a date such as 2024-12-31 or 2024-12-31T23:59:59"
        if kind is Kind.OTHER:
            return f"{holds}, which can be compared with null only"
        advice = "true or false" if kind is Kind.TRUTH else "a date" if kind is Kind.DATE else "a number"
        return f"{holds}; give {advice}" + (", without quotation marks" if self.quoted else "")

    def passes(self, value: Any) -> bool:
        """Whether a document with this value in the column is used.

        Raises:
            TypeError: the value has another type than the filter's.
        """
        if self.value is None:
            return (value is None) == (self.comparison == "=")
        if value is None:
            return False
        kind = Kind.of(value)
        if self.mismatch(kind, ""):
            raise TypeError(
                f"column {self.column!r} holds {type(value).__name__}, which {self} cannot be compared with"
            )
        compares = COMPARISONS[self.comparison]
        if kind is Kind.DATE:
            return compares(_moment(value), _moment(self._text()))
        return compares(value, self._text() if kind is Kind.TEXT else self.value)

    def _text(self) -> str:
        """The value as it was given, without quotation marks."""
        if isinstance(self.value, bool) or self.value is None:
            return next(word for word, value in _WORDS.items() if value is self.value)
        if isinstance(self.value, float) and self.value.is_integer():
            return str(int(self.value))
        return str(self.value)

    def __str__(self) -> str:
        """The condition in its shortest form; texts are in quotation marks where they must be."""
        column, text = self.column, self._text()
        if not re.fullmatch(r"[^<>=!~\s\"']+", column):
            column = json.dumps(column, ensure_ascii=False)
        if isinstance(self.value, str) and not _is_bare(self.value):
            text = json.dumps(self.value, ensure_ascii=False)
        return f"{column}{self.comparison}{text}"


def _is_bare(text: str) -> bool:
    """Whether a text means itself without quotation marks."""
    return (
        text == text.strip() != ""
        and text[0] not in "~\"'"
        and not re.search("[<>=!]", text)
        and text not in _WORDS
        and isinstance(_number_or_text(text), str)
    )


def _number_or_text(text: str) -> float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return text if number != number else number  # nan equals nothing


def _unquoted(text: str, condition: str) -> str:
    """A text without its quotation marks; its escapes are those of Python and JSON."""
    try:
        if re.fullmatch(_QUOTED, text, re.DOTALL):
            return str(ast.literal_eval(text.replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0")))
    except (SyntaxError, ValueError):
        pass
    raise LimeError(
        f"--where {condition!r}: {text} is not a text in quotation marks; end it with the mark that begins it, and write "
        "\\\\ for a backslash and \\\" or \\' for a mark inside"
    )


def _moment(value: str | date) -> datetime | None:
    """A date or a time in UTC, without a time zone; None for a text that is neither."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment.tzinfo else moment


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
