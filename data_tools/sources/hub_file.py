"""The content of a file of the hub: only the parts that are wanted, in large ranges, the next one fetched while one is used.

Neither pyarrow nor fsspec does all of this: pyarrow keeps the ranges that it has joined for as long as the file is open, and
fsspec's caches that fetch ahead take a file from end to end. Where their answers come from, nobody checks them.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.sources.hub_requests import HubError, get
from lime_dist.errors import LimeError

FIRST_BLOCK, BLOCK = 8 << 20, 32 << 20
"""Bytes of the first requests for consecutive bytes, and of all others. At most three blocks of a file are in memory."""

HOLE = 1 << 20
"""Bytes between two wanted ranges that are fetched with them: a request of its own would take longer."""

SHORTEST_TAIL, TAIL = 1 << 16, 1 << 20
"""Bytes at the end of a small and of a large file that come in one request, with the footer of most parquet files."""


def blocks(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges [first, end) of bytes with small holes between them, and cut the result into requests of up to BLOCK bytes."""
    spans: list[list[int]] = []
    for first, end in sorted(ranges):
        if spans and first <= spans[-1][1] + HOLE:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([first, end])
    result = []
    for first, end in spans:
        size = FIRST_BLOCK
        while first < end:
            result.append((first, min(first + size, end)))
            first, size = result[-1][1], min(2 * size, BLOCK)
    return result


class _Fetch(threading.Thread):
    """A range on its way; a daemon, so that a process can end while the hub does not answer."""

    def __init__(self, address: str, size: int, first: int, end: int) -> None:
        super().__init__(name="hub-range", daemon=True)
        self._given = address, size, first, end
        self._outcome: bytes | Exception = b""
        self.start()

    def run(self) -> None:
        try:
            self._outcome = fetch(*self._given)
        except Exception as error:
            self._outcome = error

    def result(self) -> bytes:
        self.join()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def fetch(address: str, size: int, first: int, end: int) -> bytes:
    """The bytes [first, end) of a file of ``size`` bytes.

    Raises:
        LimeError: they cannot be had.
    """
    wanted = f"bytes {first}-{end - 1}/{size}"

    def check(answer: httpx2.Response) -> None:
        status, got, length = answer.status_code, answer.headers.get("Content-Range"), len(answer.content)
        if status != 206 or got != wanted or length != end - first:
            raise ValueError(f"asked for {wanted}, got status {status}, {got or 'no range'} and {length} bytes")

    try:
        return get(address, check, f"bytes={first}-{end - 1}").content
    except HubError as error:
        raise LimeError(f"{error}; finished shards are kept, run the same command again") from None


class HubFile(io.RawIOBase):
    """The bytes of a file. What will be read is named by `expect`; all else is fetched when it is read.

    Args:
        sha256: of the content, which is compared when the file is read from its beginning to its end.

    Raises:
        LimeError: while reading, if a range cannot be had.
        OSError: while reading, if the content has another SHA-256.
    """

    def __init__(self, address: str, size: int, sha256: str | None = None) -> None:
        super().__init__()
        self._address, self._size, self._place = address, size, 0
        self._blocks = [(max(0, size - max(SHORTEST_TAIL, min(size // 64, TAIL))), size)]
        self._held: dict[int, _Fetch] = {}  # by the number of the block
        self._sha256, self._hashed, self._digest = sha256, 0, hashlib.sha256()

    @classmethod
    def whole(cls, address: str, size: int, sha256: str) -> io.BufferedReader:
        """A stream of a whole file, whose content is checked before its last bytes are delivered."""
        file = cls(address, size, sha256)
        file.expect([(0, size)])
        return io.BufferedReader(file, 1 << 20)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which ranges [first, end) will be read next, in about this order."""
        self._blocks, self._held = blocks(ranges), {}

    @property
    def held_bytes(self) -> int:
        """How much is in memory or on its way, in bytes."""
        return sum(end - first for first, end in (self._blocks[number] for number in self._held))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._place)]
        done = 0
        while done < len(view):
            piece = self._piece(self._place + done, len(view) - done)
            view[done : done + len(piece)] = piece
            done += len(piece)
        if self._sha256 is not None:
            self._check(view)
        self._place += done
        return done

    def _piece(self, first: int, most: int) -> memoryview:
        """At most so many bytes from ``first`` on; of one block, or of what lies between two."""
        number = bisect_right(self._blocks, (first, self._size)) - 1
        begin, end = self._blocks[number] if number >= 0 else (0, 0)
        if first < end:
            return memoryview(self._take(number))[first - begin :][:most]
        until = self._blocks[number + 1][0] if number + 1 < len(self._blocks) else self._size
        return memoryview(fetch(self._address, self._size, first, min(first + most, until)))

    def _take(self, number: int) -> bytes:
        """The content of a block; the one behind it is fetched meanwhile, and the one before it is kept."""
        for wanted in (number, number + 1):
            if wanted < len(self._blocks) and wanted not in self._held:
                self._held[wanted] = _Fetch(self._address, self._size, *self._blocks[wanted])
        self._held = {held: one for held, one in self._held.items() if abs(held - number) <= 1}
        return self._held[number].result()

    def _check(self, view: memoryview) -> None:
        if self._place != self._hashed:
            return
        self._digest.update(view)
        self._hashed += len(view)
        if self._hashed == self._size and self._digest.hexdigest() != self._sha256:
            raise OSError("its content has not the SHA-256 that the hub says")


class RemoteParquet(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """A parquet file of the hub. Its footer is kept for the next reader in this process.

    Raises:
        pyarrow.ArrowException: the footer does not fit the file.
    """

    def __init__(self, address: str, size: int) -> None:
        self._file = HubFile(address, size)
        super().__init__(self._file, metadata=_footer(address, size), pre_buffer=False, page_checksum_verification=True)

    def expect(self, groups: range, columns: Sequence[str]) -> None:
        """Say which columns of which row groups will be read."""
        self._file.expect(
            _chunk(chunk)
            for group in map(self.metadata.row_group, groups)
            for chunk in map(group.column, range(group.num_columns))
            if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns)
        )


def forget_footers() -> None:
    """Read footers again: one may have arrived damaged."""
    _footer.cache_clear()


@lru_cache(maxsize=4)
def _footer(address: str, size: int) -> pq.FileMetaData:
    meta = pq.read_metadata(HubFile(address, size))
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    chunks = [_chunk(group.column(number)) for group in groups if group.num_rows for number in range(group.num_columns)]
    rows = sum(group.num_rows for group in groups)
    if rows != meta.num_rows or any(not 0 < first < end < size for first, end in chunks):
        raise pa.ArrowInvalid("the footer does not fit the file")
    return meta


def _chunk(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where a column of a row group lies, [first, end)."""
    first = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < first:
        first = chunk.dictionary_page_offset
    return first, first + chunk.total_compressed_size
