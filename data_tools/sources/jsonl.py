"""Read documents from JSONL files, compressed or not; a bad line costs only itself."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from data_tools.sources.filters import Filter, nested
from data_tools.sources.inputs import InputFile, raise_if_unreachable
from data_tools.sources.tally import Rejection, Tally, first_line, names


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
        raise_if_unreachable(file, error)
        reason = f"cannot be read from here on ({first_line(error)})"
        tally.rejected.append(Rejection(file.name, row + 1, reason, rows=0))


def _decompressed(file: InputFile, raw: IO[bytes]) -> Any:
    """Return a stream of decompressed lines."""
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw


def _json_record(line: bytes, text_column: str, filters: tuple[Filter, ...]) -> tuple[dict[str, Any] | None, str]:
    """(record, "") of a JSONL line that has all the columns needed, or (None, reason)."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({first_line(error)})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    has = names(record)
    if text_column not in record:
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
