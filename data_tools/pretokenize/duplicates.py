"""Exact de-duplication: of identical texts anywhere in the input, only the first is kept.

    FOLDER/00000.npy …      one per unit, from its worker: (high, low, document) of each document's 128-bit hash, sorted
    FOLDER/duplicates.npy   from the parent: one bit per document of the whole input, 1 for a duplicate
    FOLDER/starts.npy       int64 [units + 1]: the first document of each unit

Texts that come over a network are kept beside the hashes; see `kept`. Hashes are compared bucket by bucket (a bucket is a range of
hashes), so memory holds one bucket whatever the input's size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_tools.common import progress_bar
from data_tools.pretokenize.kept import is_remote, keep, kept
from data_tools.pretokenize.pool import Progress
from data_tools.pretokenize.units import Selection, Unit, unit_documents
from data_tools.sources.tally import Tally
from lime_dist.data.files import sync_folder
from lime_dist.errors import LimeError

BUCKET_DOCUMENTS = 1 << 21  # about 60 bytes each during sorting
HASH_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])


class HashUnit:
    """A task that hashes a unit's documents into ``folder`` and returns the unit's index.

    Args:
        todo: the units that will be encoded next. Their texts are kept if they come over a network.
    """

    def __init__(self, folder: Path, selection: Selection, todo: Iterable[int] = ()) -> None:
        self._folder, self._selection, self._todo = folder, selection, frozenset(todo)

    def prepare(self) -> None:
        """Do nothing: hashing needs no preparation."""

    def __call__(self, unit: Unit, progress: Progress) -> int:
        hashes, tally = bytearray(), Tally()
        texts = unit_documents(unit, self._selection, tally)
        if is_remote(unit) and unit.index in self._todo:
            texts = keep(self._folder, unit, texts, tally)
        for text in texts:
            raw = text.encode()
            hashes += hashlib.blake2b(raw, digest_size=16).digest()
            progress.add(len(raw), 0)
        halves = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)
        records = np.empty(len(halves), dtype=HASH_RECORD)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["document"] = np.arange(len(halves))
        _save(_hashes_path(self._folder, unit.index), records[np.lexsort((halves[:, 1], halves[:, 0]))])
        return unit.index


class Duplicates:
    """The result of `find_duplicates`, read one unit at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = np.load(folder / "starts.npy")
        self._bits = np.load(folder / "duplicates.npy", mmap_mode="r")

    def of(self, unit: Unit) -> np.ndarray:
        """bool [documents of the unit]: True for a duplicate."""
        first, end = int(self._starts[unit.index]), int(self._starts[unit.index + 1])
        bits = np.unpackbits(self._bits[first // 8 : -(-end // 8)], bitorder="little")
        return bits[first % 8 : first % 8 + end - first].astype(bool)

    def without(self, unit: Unit, selection: Selection, tally: Tally) -> Iterator[str]:
        """Yield the texts of a unit without its duplicates, from where `HashUnit` kept them or from the input.

        Raises:
            LimeError: the number of texts differs from the number that was hashed.
        """
        marks, number = self.of(unit), 0
        texts = kept(self._folder, unit, tally) or unit_documents(unit, selection, tally)
        for number, text in enumerate(texts, start=1):
            if number > len(marks):
                break
            if not marks[number - 1]:
                yield text
        if number != len(marks):
            raise LimeError(
                f"{unit}: no longer has the {len(marks)} documents that were hashed; the input must not change "
                "while it is read: run the command again with --fresh"
            )


def hashed(folder: Path, unit: Unit) -> bool:
    """Whether an earlier, interrupted run has left a unit's hashes; files get this name only when complete."""
    try:
        return bool(np.load(_hashes_path(folder, unit.index), mmap_mode="r").dtype == HASH_RECORD)
    except (OSError, ValueError, EOFError):  # there is none, or a crash has damaged it
        return False


def find_duplicates(folder: Path, units: int) -> int:
    """Compare the hashes of all units, write the result to ``folder`` and return the number of duplicates."""
    paths = [_hashes_path(folder, unit) for unit in range(units)]
    counts = [len(np.load(path, mmap_mode="r")) for path in paths]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    buckets = max(1, -(-int(starts[-1]) // BUCKET_DOCUMENTS))
    borders = [bucket * 2**64 // buckets for bucket in range(1, buckets)]
    cuts = np.zeros((units, buckets + 1), dtype=np.int64)
    for unit, path in enumerate(paths):
        high = np.load(path)["high"]
        cuts[unit, 1:-1] = np.searchsorted(high, np.asarray(borders, dtype=np.uint64))
        cuts[unit, -1] = len(high)
    bits = np.zeros(-(-int(starts[-1]) // 8), dtype=np.uint8)
    duplicates = 0
    with progress_bar(buckets, "comparing hashes", unit=" buckets", unit_scale=False, leave=False) as bar:
        for bucket in range(buckets):
            pieces = [_read(path, *cuts[unit, bucket : bucket + 2]) for unit, path in enumerate(paths)]
            place = np.concatenate([piece["document"] + starts[unit] for unit, piece in enumerate(pieces)])
            high, low = (np.concatenate([piece[half] for piece in pieces]) for half in ("high", "low"))
            order = np.lexsort((place, low, high))
            high, low, place = high[order], low[order], place[order]
            again = place[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
            np.bitwise_or.at(bits, again // 8, np.left_shift(1, again % 8).astype(np.uint8))
            duplicates += again.size
            bar.update()
    _save(folder / "starts.npy", starts)
    _save(folder / "duplicates.npy", bits)
    return duplicates


def _hashes_path(folder: Path, unit: int) -> Path:
    return folder / f"{unit:05d}.npy"


def _read(path: Path, first: int, end: int) -> np.ndarray:
    """Read the records [first, end) of a file without mapping it: mapped pages would count as this process's memory."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(int(first) * HASH_RECORD.itemsize, os.SEEK_CUR)
        return np.fromfile(file, dtype=HASH_RECORD, count=int(end - first))


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
