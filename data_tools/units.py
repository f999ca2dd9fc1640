"""The unit of pretokenization: some row groups or files in, one shard a split out, all by one worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import InputFile, Rejection, Tally, file_text_bytes, read_file, row_group_bytes
from data_tools.tokenizer import Tokenizer
from lime_dist.data.indexed import IndexedWriter, smallest_dtype
from lime_dist.errors import LimeError

SPLITS = ("train", "validation")
BYTES_PER_TOKEN = 4  # expected; it only steers how much text makes a unit
UNITS_WANTED, SMALLEST_UNIT = 64, 4 << 20
BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1 << 20
COUNTERS = 3  # per unit, shared with the parent: text bytes, tokens, documents


@dataclass(frozen=True)
class Unit:
    """Consecutive parts of the input: (file, row groups (first, end), or None for all); ``text_bytes`` is a guess."""

    index: int
    parts: tuple[tuple[InputFile, tuple[int, int] | None], ...]
    text_bytes: int

    def __str__(self) -> str:
        names = list(dict.fromkeys(file.name for file, _ in self.parts))
        return f"unit {self.index} ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})"


@dataclass(frozen=True)
class Job:
    """What every unit of a run has in common. ``scratch`` is the folder in which workers write."""

    tokenizer: str
    scratch: str
    text_column: str
    validation_fraction: float
    add_bos: bool
    shard_tokens: int
    stop_at_rejection: bool


def plan_units(files: list[InputFile], text_column: str, shard_tokens: int) -> list[Unit]:
    """Cut the input into units, in order; a function of the input and ``shard_tokens`` alone, never of the workers.

    A unit holds the text of about one shard, or less where the input is so small that there would be fewer than 64.
    """
    pieces: list[tuple[InputFile, tuple[int, int] | None, int]] = []
    for file in files:
        groups = row_group_bytes(file, text_column) if file.is_parquet else []
        pieces += [(file, (group, group + 1), size) for group, size in enumerate(groups)]
        if not groups:
            pieces.append((file, None, file_text_bytes(file)))
    total = sum(size for *_, size in pieces)
    target = min(shard_tokens * BYTES_PER_TOKEN, max(total // UNITS_WANTED, SMALLEST_UNIT))
    units: list[Unit] = []
    parts: list[tuple[InputFile, tuple[int, int] | None]] = []
    held = 0
    for file, groups_of_part, size in pieces:
        if parts and held + size > target:
            units.append(Unit(len(units), tuple(parts), held))
            parts, held = [], 0
        before = parts[-1] if parts else None
        if before and before[0] == file and before[1] and groups_of_part:
            parts[-1] = (file, (before[1][0], groups_of_part[1]))
        else:
            parts.append((file, groups_of_part))
        held += size
    return [*units, Unit(len(units), tuple(parts), held)]


def split_of(text: bytes, validation_fraction: float) -> str:
    """The split of a document, from a hash of its text: the same wherever it stands and whatever stands beside it."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"lime split").digest(), "little")
    return "validation" if number < validation_fraction * 2**64 else "train"


class ShardSeries:
    """The shards of one unit and split: a new one begins where the next document would pass ``shard_tokens``."""

    def __init__(self, job: Job, unit: int, split: str, dtype: np.dtype[Any]) -> None:
        self._job, self._dtype, self._stem = job, dtype, f"{split}-{unit:05d}"
        self._writer: IndexedWriter | None = None
        self._text_bytes = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document."""
        if self._writer and self._writer.tokens + ids.size > self._job.shard_tokens:
            self.close()
        if not self._writer:
            name = f"{self._stem}-{len(self.shards):02d}"
            self._writer = IndexedWriter(Path(self._job.scratch) / name, self._dtype)
            self._text_bytes = 0
        self._writer.add_document(ids)
        self._text_bytes += text_bytes

    def close(self) -> None:
        """Finish the shard that is open, if any."""
        if self._writer:
            writer, self._writer = self._writer, None
            writer.close()
            self.shards.append(
                {
                    "name": f"{self._stem}-{len(self.shards):02d}",
                    "tokens": writer.tokens,
                    "documents": writer.documents,
                    "text_bytes": self._text_bytes,
                    "bin_bytes": writer.bin_bytes,
                    "idx_bytes": writer.idx_bytes,
                    "bin_sha256": writer.bin_sha256,
                    "idx_sha256": writer.idx_sha256,
                }
            )

    def abort(self) -> None:
        """Remove the shard that is open."""
        if self._writer:
            self._writer.abort()


class Stopped(Exception):
    """The parent has asked the workers to stop."""


def encode_unit(unit: Unit, job: Job, tokenizer: Tokenizer, counters: Any) -> dict[str, Any]:
    """Encode one unit into shards in ``job.scratch`` and describe them (a JSON value: shards by split, and the tally).

    ``counters`` is a shared array of integers: [0] asks to stop when it is not 0, then COUNTERS entries a unit.
    LimeError at the first rejection if ``job.stop_at_rejection``.
    """
    tally, slot = Tally(), 1 + COUNTERS * unit.index
    series = {split: ShardSeries(job, unit.index, split, smallest_dtype(tokenizer.vocab_size)) for split in SPLITS}
    before, after = int(job.add_bos), 1
    try:
        for texts in _batches(unit, job, tally):
            if counters[0]:
                raise Stopped
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                document = np.empty(before + ids.size + after, dtype=smallest_dtype(tokenizer.vocab_size))
                document[:before] = tokenizer.bos_id
                document[before:-after] = ids
                document[-after:] = tokenizer.eos_id
                raw = text.encode()
                series[split_of(raw, job.validation_fraction)].add(document, len(raw))
                for i, count in enumerate((len(raw), document.size, 1)):
                    counters[slot + i] += count
        for one in series.values():
            one.close()
    except BaseException:
        for one in series.values():
            one.abort()
        raise
    counts = {"rows": tally.rows, "null": tally.null, "empty": tally.empty}
    shards = {split: one.shards for split, one in series.items()}
    return {"unit": unit.index, **counts, "rejected": [asdict(r) for r in tally.rejected], "shards": shards}


def _batches(unit: Unit, job: Job, tally: Tally) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for file, row_groups in unit.parts:
        for _, text in read_file(file, job.text_column, tally, row_groups):
            _refuse(job, tally)
            texts.append(text)
            characters += len(text)
            if len(texts) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
        _refuse(job, tally)
    if texts:
        yield texts


def _refuse(job: Job, tally: Tally) -> None:
    if job.stop_at_rejection and tally.rejected:
        raise rejection_error(tally.rejected[0])


def rejection_error(rejection: Rejection) -> LimeError:
    """What ``--on-error stop`` says."""
    return LimeError(f"{rejection}; mend the file, or count such rows and go on with --on-error skip")
