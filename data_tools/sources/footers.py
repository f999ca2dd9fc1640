"""How much text the row groups of parquet files hold. What comes from the hub is recorded: a restart asks for none of it again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from data_tools.common import progress_bar
from data_tools.sources.inputs import HubInputFile, InputFile, fingerprint, row_group_bytes
from lime_dist.data.files import json_line, read_json_lines

FOOTERS_FILE = ".footers.ndjson"
AT_ONCE = 16  # one thread each, to hide network latency


def read_footers(files: list[InputFile], text_column: str, footers: Footers | None = None) -> Iterator[list[int]]:
    """Yield `row_group_bytes` of each file, in order; [] for JSONL.

    Args:
        footers: what is known, and where it is recorded.
    """

    def of(file: InputFile) -> list[int]:
        if not file.is_parquet:
            return []
        return footers.row_groups(file, text_column) if footers else row_group_bytes(file, text_column)

    with (
        ThreadPoolExecutor(AT_ONCE) as threads,
        progress_bar(len(files), "reading footers", unit=" files", unit_scale=False, leave=False) as bar,
    ):
        for groups in threads.map(of, files):
            yield groups
            bar.update()


class Footers:
    """The bytes of text in each row group of files, in a file of one line for each: its fingerprint, ``column`` and ``groups``.

    The record is deleted when it is not needed any more; see `remove`. Files of this machine are not recorded.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / FOOTERS_FILE, Lock()
        self._known = {_key(line, line.get("column")): line.get("groups") for _, line in read_json_lines(self._path)[0]}

    def row_groups(self, file: InputFile, text_column: str) -> list[int]:
        """`row_group_bytes`, from the record if the file is in it."""
        if not isinstance(file, HubInputFile):
            return row_group_bytes(file, text_column)
        facts = fingerprint(file)
        key = _key(facts, text_column)
        groups = self._known.get(key)
        if not isinstance(groups, list):
            groups = row_group_bytes(file, text_column)
            with self._lock, open(self._path, "ab") as record:
                record.write(json_line({**facts, "column": text_column, "groups": groups}))
        return groups

    def remove(self) -> None:
        """Delete the record."""
        self._path.unlink(missing_ok=True)


def _key(facts: dict[str, Any], column: Any) -> tuple[Any, ...]:
    return facts.get("name"), facts.get("bytes"), facts.get("sha256"), column
