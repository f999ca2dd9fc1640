"""Documents from parquet and JSONL files: which files, which rows, and what is wrong with any of them."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.common import command_parser
from lime_dist.errors import LimeError, run_command

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
ROWS_AT_ONCE = 256
GZIP_RATIO = 4  # expected, for estimates alone
PROBES, PROBE_BYTES = 64, 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file to read: ``path`` on this machine, and ``name`` relative to the input, for outputs and messages."""

    path: str
    name: str

    @property
    def is_parquet(self) -> bool:
        """Parquet, else JSONL."""
        return self.name.endswith(".parquet")


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
    """What a reader met: ``rows`` in all, ``null`` and ``empty`` (white space only) among them, and rejections."""

    rows: int = 0
    null: int = 0
    empty: int = 0
    rejected: list[Rejection] = field(default_factory=list)

    def text_or_none(self, file: str, row: int, value: bytes | None) -> str | None:
        """Count one row and give its text, or None if it has none that can be used."""
        self.rows += 1
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


def list_inputs(given: str) -> list[InputFile]:
    """The files of a folder (searched through), a glob or one file, sorted by name; LimeError if there are none."""
    kinds = ", ".join(SUFFIXES)
    root = Path(given)
    if root.is_dir():
        visible = (path for path in root.rglob("*") if "/." not in f"/{path.relative_to(root).as_posix()}")
        files = [InputFile(str(path), path.relative_to(root).as_posix()) for path in visible if path.is_file()]
    elif root.is_file():
        files = [InputFile(given, root.name)]
    else:
        found = [path for path in map(Path, glob.glob(given, recursive=True)) if path.is_file()]
        if not found:
            raise LimeError(f"--input {given}: no such file or folder, and no file matches; give one with {kinds}")
        # Names are relative to the last folder before the first wildcard: two files of one name stay apart.
        fixed = Path(*root.parts[: next(i for i, part in enumerate(root.parts) if glob.has_magic(part))])
        files = [InputFile(str(path), path.relative_to(fixed).as_posix()) for path in found]
    usable = sorted((file for file in files if file.name.endswith(SUFFIXES)), key=lambda file: file.name)
    if not usable:
        raise LimeError(f"--input {given}: no {kinds} among {len(files)} files; give text in one of these forms")
    return usable


def fingerprint(file: InputFile) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file; of one over 64 MiB, of 64 blocks of 1 MiB spread evenly from end to end."""
    digest, size = hashlib.sha256(), Path(file.path).stat().st_size
    with open(file.path, "rb") as stream:
        for probe in range(PROBES):
            if size > PROBES * PROBE_BYTES:
                stream.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
            digest.update(stream.read(PROBE_BYTES))
    return {"name": file.name, "bytes": size, "sha256": digest.hexdigest()}


def file_text_bytes(file: InputFile) -> int:
    """About how much text a JSONL file holds, from its size."""
    return Path(file.path).stat().st_size * (GZIP_RATIO if file.name.endswith(".gz") else 1)


def row_group_bytes(file: InputFile, text_column: str) -> list[int]:
    """Bytes of text, before compression, in each row group of a parquet file; [] if its footer cannot be read."""
    try:
        with pq.ParquetFile(file.path) as reader:
            paths = [reader.schema.column(i).path for i in range(len(reader.schema))]
            column = paths.index(text_column) if text_column in paths else 0
            groups = (reader.metadata.row_group(i) for i in range(reader.metadata.num_row_groups))
            return [group.column(column).total_uncompressed_size for group in groups]
    except (pa.ArrowException, OSError):
        return []


def read_file(
    file: InputFile, text_column: str, tally: Tally, row_groups: tuple[int, int] | None = None
) -> Iterator[tuple[int, str]]:
    """The (row, text) of a file's documents, rows counted from 1; what is not given out is counted in ``tally``.

    ``row_groups`` (first, end) reads a part of a parquet file. Damage costs the rows that it hits, not a file's rest.
    """
    if file.is_parquet:
        yield from _read_parquet(file, text_column, tally, row_groups)
    else:
        yield from _read_jsonl(file, text_column, tally)


def documents(given: str, text_column: str, tally: Tally) -> Iterator[tuple[str, int, str]]:
    """The (file name, row, text) of every document of a folder, a glob or a file, in order."""
    for file in list_inputs(given):
        for row, text in read_file(file, text_column, tally):
            yield file.name, row, text


def _read_parquet(
    file: InputFile, text_column: str, tally: Tally, row_groups: tuple[int, int] | None
) -> Iterator[tuple[int, str]]:
    try:
        reader = pq.ParquetFile(file.path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        tally.rejected.append(Rejection(file.name, 0, f"not readable as parquet ({_line(error)})", rows=0))
        return
    with reader:
        meta = reader.metadata
        first, end = row_groups or (0, meta.num_row_groups)
        # ends[g]: rows of the file before row group g
        ends = [0, *accumulate(meta.row_group(group).num_rows for group in range(end))]
        reason = _no_text_column(reader.schema_arrow, text_column)
        if reason:
            rows = ends[end] - ends[first]
            tally.rows += rows
            tally.rejected.append(Rejection(file.name, 0, reason, rows))
            return
        for group in range(first, end):
            row = ends[group]
            try:
                for batch in reader.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[text_column]):
                    # As bytes, so that one row with invalid UTF-8 is one row's damage.
                    column = batch.column(0)
                    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                    for value in plain.cast(pa.large_binary()).to_pylist():
                        row += 1
                        text = tally.text_or_none(file.name, row, value)
                        if text is not None:
                            yield row, text
            except (pa.ArrowException, OSError) as error:
                lost = ends[group + 1] - row
                tally.rows += lost
                reason = f"row group {group} is damaged, {lost} rows are lost ({_line(error)})"
                tally.rejected.append(Rejection(file.name, row + 1, reason, rows=lost))


def _no_text_column(schema: pa.Schema, text_column: str) -> str:
    """Why a parquet file's column cannot be read as text, or ""."""
    if text_column not in schema.names:
        return f"no column {text_column!r}, it has {', '.join(schema.names)}"
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return f"column {text_column!r} holds {kind}, not text"
    return ""


def _read_jsonl(file: InputFile, text_column: str, tally: Tally) -> Iterator[tuple[int, str]]:
    opener: Any = gzip.open if file.name.endswith(".gz") else open
    row = 0
    try:
        stream: IO[bytes]
        with opener(file.path, "rb") as stream:
            for row, line in enumerate(stream, start=1):
                if row == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                value, reason = _json_text(line, text_column)
                if reason:
                    tally.rows += 1
                    tally.rejected.append(Rejection(file.name, row, reason))
                    continue
                text = tally.text_or_none(file.name, row, value)
                if text is not None:
                    yield row, text
    except (EOFError, OSError, zlib.error) as error:
        reason = f"cannot be read from here on ({_line(error)})"
        tally.rejected.append(Rejection(file.name, row + 1, reason, rows=0))


def _json_text(line: bytes, text_column: str) -> tuple[bytes | None, str]:
    """The text of one JSONL line as UTF-8, or why there is none; (None, "") is a null."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({_line(error)})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    if text_column not in record:
        return None, f"no column {text_column!r}, it has {', '.join(map(str, record)) or 'none'}"
    value = record[text_column]
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
