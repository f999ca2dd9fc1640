"""Read the selected documents of parquet and JSONL files."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.sources.filters import Filter
from data_tools.sources.inputs import InputFile
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
    """Yield (row, text) of a file's documents, with rows counted from 1; ``tally`` counts the rows that are left out.

    Damage costs only the rows that it hits, not the rest of the file.

    Args:
        row_groups: (first, end), the part of a parquet file to read. Default: all of it.

    Raises:
        OSError: a remote file cannot be reached, so nothing is known about its rows.
    """
    if file.is_parquet:
        yield from read_parquet(file, text_column, tally, row_groups, filters)
    else:
        yield from read_jsonl(file, text_column, tally, filters)


def documents(
    files: list[InputFile], text_column: str, tally: Tally, filters: tuple[Filter, ...] = ()
) -> Iterator[tuple[str, int, str]]:
    """Yield (file name, row, text) of every document of an input, in order."""
    for file in files:
        for row, text in read_file(file, text_column, tally, filters=filters):
            yield file.name, row, text
