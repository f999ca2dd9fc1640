"""Documents from parquet and JSONL files: which rows have text that is wanted, and what is wrong with any of them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import IO, Any

import pyarrow as pa

from data_tools.common import command_parser
from data_tools.filters import Filter, nested
from data_tools.inputs import InputFile, list_inputs, open_parquet, raise_if_unreachable
from lime_dist.errors import run_command

ROWS_AT_ONCE = 256


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


def read_file(
    file: InputFile,
    text_column: str,
    tally: Tally,
    row_groups: tuple[int, int] | None = None,
    filters: tuple[Filter, ...] = (),
) -> Iterator[tuple[int, str]]:
    """The (row, text) of a file's documents, rows counted from 1; what is not given out is counted in ``tally``.

    ``row_groups`` (first, end) reads a part of a parquet file. Damage costs the rows that it hits, not a file's rest.

    Raises:
        OSError: a remote file cannot be reached; nothing is known of its rows then.
    """
    if file.is_parquet:
        yield from _read_parquet(file, text_column, tally, row_groups, filters)
    else:
        yield from _read_jsonl(file, text_column, tally, filters)


def documents(
    given: str, text_column: str, tally: Tally, filters: tuple[Filter, ...] = ()
) -> Iterator[tuple[str, int, str]]:
    """The (file name, row, text) of every document of an input, in order."""
    for file in list_inputs(given):
        for row, text in read_file(file, text_column, tally, filters=filters):
            yield file.name, row, text


def _read_parquet(
    file: InputFile,
    text_column: str,
    tally: Tally,
    row_groups: tuple[int, int] | None,
    filters: tuple[Filter, ...],
) -> Iterator[tuple[int, str]]:
    with ExitStack() as stack:
        try:
            reader = stack.enter_context(open_parquet(file))
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(file, error)
            tally.rejected.append(Rejection(file.name, 0, f"not readable as parquet ({_line(error)})", rows=0))
            return
        meta = reader.metadata
        first, end = row_groups or (0, meta.num_row_groups)
        # ends[g]: rows of the file before row group g
        ends = [0, *accumulate(meta.row_group(group).num_rows for group in range(end))]
        reason = _no_text_column(reader.schema_arrow, text_column) or _no_column(reader.schema_arrow, filters)
        if reason:
            rows = ends[end] - ends[first]
            tally.rows += rows
            tally.rejected.append(Rejection(file.name, 0, reason, rows))
            return
        columns = list(dict.fromkeys([text_column, *(condition.column for condition in filters)]))
        for group in range(first, end):
            row = ends[group]
            try:
                for batch in reader.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    texts = _as_bytes(batch.column(text_column))
                    values = [_values(batch, condition.column) for condition in filters]
                    for i, raw in enumerate(texts):
                        row += 1
                        tally.rows += 1
                        found = ((condition, value[i]) for condition, value in zip(filters, values, strict=True))
                        if filters and not tally.wanted(file.name, row, found):
                            continue
                        text = tally.text_or_none(file.name, row, raw)
                        if text is not None:
                            yield row, text
            except (pa.ArrowException, OSError) as error:
                raise_if_unreachable(file, error)
                lost = ends[group + 1] - row
                tally.rows += lost
                reason = f"row group {group} is damaged, {lost} rows are lost ({_line(error)})"
                tally.rejected.append(Rejection(file.name, row + 1, reason, rows=lost))


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """As bytes, so that one row with invalid UTF-8 is one row's damage."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.large_binary()).to_pylist()


def _values(batch: pa.RecordBatch, column: str) -> list[Any]:
    top = column if column in batch.schema.names else column.split(".")[0]
    return [nested({top: value}, column) for value in batch.column(top).to_pylist()]


def _no_text_column(schema: pa.Schema, text_column: str) -> str:
    """Why a parquet file's column cannot be read as text, or ""."""
    if text_column not in schema.names:
        return f"no column {text_column!r}, it has {', '.join(schema.names)}"
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return f"column {text_column!r} holds {kind}, not text"
    return ""


def _no_column(schema: pa.Schema, filters: tuple[Filter, ...]) -> str:
    """Which condition's column a parquet file lacks, or ""."""
    for condition in filters:
        if condition.column in schema.names:
            continue
        names, kind = schema.names, None
        for part in condition.column.split("."):
            if part not in names:
                return f"no column {condition.column!r} (--where {condition}), it has {', '.join(schema.names)}"
            kind = schema.field(part).type if kind is None else kind.field(part).type
            names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return ""


def _read_jsonl(
    file: InputFile, text_column: str, tally: Tally, filters: tuple[Filter, ...]
) -> Iterator[tuple[int, str]]:
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
                found = ((condition, nested(record, condition.column)) for condition in filters)
                if filters and not tally.wanted(file.name, row, found):
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
        reason = f"cannot be read from here on ({_line(error)})"
        tally.rejected.append(Rejection(file.name, row + 1, reason, rows=0))


def _decompressed(file: InputFile, raw: IO[bytes]) -> Any:
    """A stream of lines."""
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw


def _json_record(line: bytes, text_column: str, filters: tuple[Filter, ...]) -> tuple[dict[str, Any] | None, str]:
    """The record of one JSONL line that has all columns asked for, or why there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({_line(error)})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    has = ", ".join(map(str, record)) or "none"
    if text_column not in record:
        return None, f"no column {text_column!r}, it has {has}"
    for condition in filters:
        try:
            nested(record, condition.column)
        except KeyError:
            return None, f"no column {condition.column!r} (--where {condition}), it has {has}"
    return record, ""


def _json_text(value: Any, text_column: str) -> tuple[bytes | None, str]:
    """A text as UTF-8, or why it is none; (None, "") is a null."""
    if value is None:
        return None, ""
    if not isinstance(value, str):
        return None, f"column {text_column!r} holds {type(value).__name__}, not text"
    try:
        return value.encode(), ""
    except UnicodeEncodeError:
        return None, "a lone surrogate: text that no encoding can hold"


def _line(error: BaseException) -> str:
    """An error's first line, which is all that belongs in a list of rejections."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.sources embedded``."""
    from data_tools import embedded

    parser = command_parser(
        "sources",
        "Gather text that needs no download, as parquet with FineWeb-Edu's columns.",
        "python -m data_tools.sources embedded --output data/embedded",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    embedded.add_arguments(commands)
    embedded.run(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
