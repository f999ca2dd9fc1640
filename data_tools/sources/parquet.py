"""Read documents from parquet files; damage costs only the rows that it hits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import pyarrow as pa

from data_tools.sources.filters import Filter, Kind, nested
from data_tools.sources.hub_file import RemoteParquet
from data_tools.sources.inputs import InputFile, open_parquet, raise_if_remote
from data_tools.sources.tally import Rejection, Tally, names, reason_of

ROWS_AT_ONCE = 256
KINDS = {
    Kind.TEXT: (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    Kind.NUMBER: (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
    Kind.TRUTH: (pa.types.is_boolean,),
    Kind.DATE: (pa.types.is_date, pa.types.is_timestamp),
    Kind.NULL: (pa.types.is_null,),
}


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
            raise_if_remote(file, error)
            tally.rejected.append(Rejection(file.name, 0, f"not readable as parquet ({reason_of(error)})", rows=0))
            return
        meta = reader.metadata
        first, end = row_groups or (0, meta.num_row_groups)
        if end > meta.num_row_groups:  # when the units were planned it had more
            raise_if_remote(file, pa.ArrowInvalid("its footer has changed"))
        # ends[g]: the number of rows before row group g
        ends = [0, *accumulate(meta.row_group(group).num_rows for group in range(end))]
        reason = _no_text_column(reader.schema_arrow, text_column) or condition_problem(reader.schema_arrow, filters)
        if reason:
            rows = ends[end] - ends[first]
            tally.rows += rows
            tally.rejected.append(Rejection(file.name, 0, reason, rows))
            return
        columns = list(
            dict.fromkeys([text_column, *(_path(reader.schema_arrow, condition.column) for condition in filters)])
        )
        if isinstance(reader, RemoteParquet):
            reader.expect(range(first, end), columns)
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
                raise_if_remote(file, error)
                lost = ends[group + 1] - row
                tally.rows += lost
                reason = f"row group {group} is damaged, {lost} rows are lost ({reason_of(error)})"
                tally.rejected.append(Rejection(file.name, row + 1, reason, rows=lost))


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """Read texts as bytes, so that invalid UTF-8 costs only its own row."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.large_binary()).to_pylist()


def _values(batch: pa.RecordBatch, column: str) -> list[Any]:
    top = column if column in batch.schema.names else column.split(".")[0]
    values = batch.column(top)
    if pa.types.is_timestamp(values.type):  # Python's times have no nanoseconds
        values = values.cast(pa.timestamp("us", values.type.tz), safe=False)
    return [nested({top: value}, column) for value in values.to_pylist()]


def _no_text_column(schema: pa.Schema, text_column: str) -> str:
    """The reason why a parquet file's column cannot be read as text, or ""."""
    if (count := schema.names.count(text_column)) != 1:
        return (
            f"{count} columns {text_column!r}" if count else f"no column {text_column!r}, it has {names(schema.names)}"
        )
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _kind(kind) not in (Kind.TEXT, Kind.NULL):
        return f"column {text_column!r} holds {kind}, not text"
    return ""


def _path(schema: pa.Schema, column: str) -> str:
    """The column to read for a condition: its struct, if that has no values and so no fields."""
    top = column.split(".")[0]
    is_empty = column not in schema.names and pa.types.is_null(schema.field(top).type)
    return top if is_empty else column


def mismatched_condition(file: InputFile, filters: tuple[Filter, ...]) -> str:
    """Why a condition does not fit the type of its column in a parquet file, or ""; a missing column fits."""
    try:
        with open_parquet(file) as reader:
            kinds = [(one, _column_type(reader.schema_arrow, one.column)) for one in filters]
    except (pa.ArrowException, OSError) as error:
        raise_if_remote(file, error)
        return ""  # reported when it is read
    problems = (one.mismatch(_kind(kind), str(kind)) for one, kind in kinds if not isinstance(kind, str))
    return next(filter(None, problems), "")


def condition_problem(schema: pa.Schema, filters: tuple[Filter, ...]) -> str:
    """Why a condition cannot be checked on a parquet file, its column being missing or of another type, or ""."""
    for condition in filters:
        kind = _column_type(schema, condition.column)
        if isinstance(kind, str):
            return f"{kind} (--where {condition}), it has {names(schema.names)}"
        if problem := condition.mismatch(_kind(kind), str(kind)):
            return problem
    return ""


def _column_type(schema: pa.Schema, column: str) -> pa.DataType | str:
    """The type of a column or of a field of a struct, or why there is none."""
    parts = [column] if column in schema.names else column.split(".")
    if (count := schema.names.count(parts[0])) != 1:
        return f"{count} columns {column!r}" if count else f"no column {column!r}"
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if pa.types.is_null(kind):
            break  # without a value there are no fields either
        fields = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if part not in fields:
            return f"no column {column!r}"
        kind = kind.field(fields.index(part)).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _kind(kind: pa.DataType) -> Kind:
    return next((own for own, checks in KINDS.items() if any(check(kind) for check in checks)), Kind.OTHER)
