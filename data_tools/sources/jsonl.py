"""Read documents from JSONL files, compressed or not; a bad line costs only itself."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from data_tools.sources.filters import Filter, Kind, nested
from data_tools.sources.inputs import InputFile, raise_if_remote
from data_tools.sources.tally import Rejection, Tally, names, reason_of

FIRST_ROWS = 100
"""Rows whose values tell the type of a column."""


def read_jsonl(
    file: InputFile, text_column: str, tally: Tally, filters: tuple[Filter, ...]
) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a JSONL file's documents; see `documents.read_file`."""
    row = 0
    try:
        with file.open() as raw, _decompressed(file, raw) as stream:
            for row, line in enumerate(stream, start=1):
                if row == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                tally.rows += 1
                record, reason = _json_record(line, text_column, filters)
                if record is None:
                    tally.rejected.append(Rejection(file.name, row, reason))
                    continue
                values = ((condition, nested(record, condition.column)) for condition in filters)
                if filters and not tally.wanted(file.name, row, values):
                    continue
                value, reason = _json_text(record[text_column], text_column)
                if reason:
                    tally.rejected.append(Rejection(file.name, row, reason))
                    continue
                text = tally.text_or_none(file.name, row, value)
                if text is not None:
                    yield row, text
    except (EOFError, OSError, zlib.error) as error:
        raise_if_remote(file, error)
        reason = f"cannot be read from here on ({reason_of(error)})"
        tally.rejected.append(Rejection(file.name, row + 1, reason, rows=0))


def mismatched_condition(file: InputFile, filters: tuple[Filter, ...]) -> str:
    """Why a condition fits no value of its column in the first rows of a JSONL file, or ""; a missing column fits."""
    problems: dict[Filter, list[str]] = {condition: [] for condition in filters}
    try:
        with file.open() as raw, _decompressed(file, raw) as stream:
            for line in islice(stream, FIRST_ROWS):
                record, _ = _json_record(line.removeprefix(b"\xef\xbb\xbf"), None, filters)
                for condition in filters if record is not None else ():
                    value = nested(record, condition.column)
                    if value is not None:
                        problems[condition].append(condition.mismatch(Kind.of(value), type(value).__name__))
    except (EOFError, OSError, zlib.error) as error:
        raise_if_remote(file, error)
    return next((reasons[0] for reasons in problems.values() if reasons and all(reasons)), "")


def _decompressed(file: InputFile, raw: IO[bytes]) -> Any:
    """Return a stream of decompressed lines."""
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw


def _json_record(
    line: bytes, text_column: str | None, filters: tuple[Filter, ...]
) -> tuple[dict[str, Any] | None, str]:
    """(record, "") of a JSONL line that has all the columns needed, or (None, reason)."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({reason_of(error)})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    has = names(record)
    if text_column is not None and text_column not in record:
        return None, f"no column {text_column!r}, it has {has}"
    for condition in filters:
        try:
            nested(record, condition.column)
        except KeyError:
            return None, f"no column {condition.column!r} (--where {condition}), it has {has}"
    return record, ""


def _json_text(value: Any, text_column: str) -> tuple[bytes | None, str]:
    """(text as UTF-8, ""), or (None, reason); (None, "") for a null."""
    if value is None:
        return None, ""
    if not isinstance(value, str):
        return None, f"column {text_column!r} holds {type(value).__name__}, not text"
    try:
        return value.encode(), ""
    except UnicodeEncodeError:
        return None, "a lone surrogate, which UTF-8 cannot encode"
