"""Read the selected documents of parquet and JSONL files."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.sources import jsonl, parquet
from data_tools.sources.filters import Filter
from data_tools.sources.inputs import InputFile
from data_tools.sources.tally import Tally
from lime_dist.errors import LimeError


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
        yield from parquet.read_parquet(file, text_column, tally, row_groups, filters)
    else:
        yield from jsonl.read_jsonl(file, text_column, tally, filters)


def check_conditions(files: list[InputFile], filters: tuple[Filter, ...]) -> None:
    """Check conditions against the types of their columns in the first file of each format.

    Raises:
        LimeError: a value cannot be compared with its column.
    """
    for mismatched, of_format in (
        (parquet.mismatched_condition, [file for file in files if file.is_parquet]),
        (jsonl.mismatched_condition, [file for file in files if not file.is_parquet]),
    ):
        if filters and of_format and (problem := mismatched(of_format[0], filters)):
            raise LimeError(f"--where: {problem} ({of_format[0].name})")


def documents(
    files: list[InputFile], text_column: str, tally: Tally, filters: tuple[Filter, ...] = ()
) -> Iterator[tuple[str, int, str]]:
    """Yield (file name, row, text) of every document of an input, in order."""
    for file in files:
        for row, text in read_file(file, text_column, tally, filters=filters):
            yield file.name, row, text
