"""Read documents from parquet files; damage costs only the rows that it hits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import pyarrow as pa

from data_tools.sources.filters import Filter, nested
from data_tools.sources.inputs import InputFile, open_parquet, raise_if_unreachable
from data_tools.sources.tally import Rejection, Tally, first_line, names

ROWS_AT_ONCE = 256
TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)  # null: no texts


def read_parquet(
    file: InputFile,
    text_column: str,
    tally: Tally,
    row_groups: tuple[int, int] | None,
    filters: tuple[Filter, ...],
) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a parquet file's documents; see `documents.read_file`."""
    with ExitStack() as stack:
        try:
            reader = stack.enter_context(open_parquet(file))
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(file, error)
            tally.rejected.append(Rejection(file.name, 0, f"not readable as parquet ({first_line(error)})", rows=0))
            return
        meta = reader.metadata
        first, end = row_groups or (0, meta.num_row_groups)
        # ends[g]: the number of rows before row group g
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
                        row_values = ((condition, column[i]) for condition, column in zip(filters, values, strict=True))
                        if filters and not tally.wanted(file.name, row, row_values):
                            continue
                        text = tally.text_or_none(file.name, row, raw)
                        if text is not None:
                            yield row, text
            except (pa.ArrowException, OSError) as error:
                raise_if_unreachable(file, error)
                lost = ends[group + 1] - row
                tally.rows += lost
                reason = f"row group {group} is damaged, {lost} rows are lost ({first_line(error)})"
                tally.rejected.append(Rejection(file.name, row + 1, reason, rows=lost))


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """Read texts as bytes, so that invalid UTF-8 costs only its own row."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.large_binary()).to_pylist()


def _values(batch: pa.RecordBatch, column: str) -> list[Any]:
    top = column if column in batch.schema.names else column.split(".")[0]
    return [nested({top: value}, column) for value in batch.column(top).to_pylist()]


def _no_text_column(schema: pa.Schema, text_column: str) -> str:
    """The reason why a parquet file's column cannot be read as text, or ""."""
    if (count := schema.names.count(text_column)) != 1:
        return (
            f"{count} columns {text_column!r}" if count else f"no column {text_column!r}, it has {names(schema.names)}"
        )
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_kind(kind) for is_kind in TEXT_TYPES):
        return f"column {text_column!r} holds {kind}, not text"
    return ""


def _no_column(schema: pa.Schema, filters: tuple[Filter, ...]) -> str:
    """The reason why a condition cannot be checked, the parquet file lacking its column, or ""."""
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
