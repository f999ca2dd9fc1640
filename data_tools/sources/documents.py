"""Documents from parquet and JSONL files: the rows whose text is wanted, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.sources.filters import Filter
from data_tools.sources.inputs import InputFile, list_inputs
from data_tools.sources.jsonl import read_jsonl
from data_tools.sources.parquet import read_parquet
from data_tools.sources.tally import Tally


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
        yield from read_parquet(file, text_column, tally, row_groups, filters)
    else:
        yield from read_jsonl(file, text_column, tally, filters)


def documents(
    given: str, text_column: str, tally: Tally, filters: tuple[Filter, ...] = ()
) -> Iterator[tuple[str, int, str]]:
    """The (file name, row, text) of every document of an input, in order."""
    for file in list_inputs(given):
        for row, text in read_file(file, text_column, tally, filters=filters):
            yield file.name, row, text
