"""What a worker does with a unit: select its documents, encode them, and write a series of shards for each split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.pretokenize.duplicates import Duplicates
from data_tools.pretokenize.pool import Progress
from data_tools.pretokenize.units import Selection, Unit, unit_documents
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.encoder_choice import EncoderDifference, difference
from lime_dist.data.indexed import IndexedWriter, smallest_dtype

SPLITS = ("train", "validation", "test")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1 << 20
CHECK_EVERY = 512
"""Of a unit, each document whose number this divides is encoded with sentencepiece too, and the ids are compared. The numbers count
from the beginning of the unit, so that a difference is seen again when a killed run is continued."""


@dataclass(frozen=True)
class Layout:
    """How documents become shards.

    Attributes:
        validation, test: shares of the documents.
        shard_tokens: the maximum number of tokens in a shard.
        shuffle: a seed, or None to keep the order of the input.
        bos, eos: whether a document begins with bos and ends with eos.
    """

    validation: float
    test: float
    shard_tokens: int
    shuffle: int | None
    bos: bool
    eos: bool


def split_of(text: bytes, validation: float, test: float = 0.0) -> str:
    """The split of a document: a function of its text alone, whatever its place in the input and its neighbours."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"lime split").digest(), "little") / 2**64
    return "validation" if number < validation else "test" if number < validation + test else "train"


class ShardSeries:
    """The shards of one unit and split; a new one begins when the next document would exceed ``shard_tokens``."""

    def __init__(self, scratch: Path, layout: Layout, unit: int, split: str, dtype: np.dtype[Any]) -> None:
        self._scratch, self._layout, self._dtype = scratch, layout, dtype
        self._unit, self._split = unit, split
        self._writer: IndexedWriter | None = None
        self._waiting: list[np.ndarray] = []  # until the shard is shuffled and written
        self._tokens = self._text_bytes = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document."""
        if self._writer and self._tokens + ids.size > self._layout.shard_tokens:
            self.close()
        if not self._writer:
            self._writer = IndexedWriter(self._scratch / self._name(), self._dtype)
            self._tokens = self._text_bytes = 0
        if self._layout.shuffle is None:
            self._writer.add_document(ids)
        else:
            self._waiting.append(ids)
        self._tokens += ids.size
        self._text_bytes += text_bytes

    def _name(self) -> str:
        return f"{self._split}-{self._unit:05d}-{len(self.shards):02d}"

    def close(self) -> None:
        """Finish the open shard, if any."""
        if not self._writer:
            return
        if self._layout.shuffle is not None:
            place = (self._layout.shuffle, self._unit, SPLITS.index(self._split), len(self.shards))
            for i in np.random.default_rng(place).permutation(len(self._waiting)):
                self._writer.add_document(self._waiting[i])
            self._waiting = []
        writer, self._writer = self._writer, None
        writer.close()
        self.shards.append(
            {
                "name": self._name(),
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
        """Remove the open shard, if any."""
        if self._writer:
            self._writer.abort()


class EncodeUnit:
    """A task that encodes a unit into shards in ``scratch`` and returns a JSON value: the shards by split, and the tally.

    Args:
        tokenizer: its folder.
        converted_model: `Tokenizer.converted_model` to encode with gigatoken; None: with the tokenizer's own encoder.
        duplicates: the folder that `duplicates.find_duplicates` wrote to; None keeps all documents.

    Raises:
        EncoderDifference: gigatoken gives a document other ids than sentencepiece.
    """

    def __init__(
        self,
        tokenizer: Path,
        converted_model: str | None,
        scratch: Path,
        selection: Selection,
        layout: Layout,
        duplicates: Path | None,
    ) -> None:
        self._folder, self._scratch, self._selection, self._layout = tokenizer, scratch, selection, layout
        self._converted_model, self._duplicates_folder = converted_model, duplicates

    def prepare(self) -> None:
        """Open the tokenizer and the list of duplicates."""
        self._tokenizer = Tokenizer(self._folder, verify=False)  # the parent has just done it
        if self._converted_model is not None:
            self._tokenizer = self._tokenizer.with_gigatoken(self._converted_model)
        self._dtype = smallest_dtype(self._tokenizer.vocab_size)
        self._duplicates = Duplicates(self._duplicates_folder) if self._duplicates_folder else None

    def __call__(self, unit: Unit, progress: Progress) -> dict[str, Any]:
        tally, tokenizer, layout = Tally(), self._tokenizer, self._layout
        series = {split: ShardSeries(self._scratch, layout, unit.index, split, self._dtype) for split in SPLITS}
        if self._duplicates:
            duplicates = int(self._duplicates.of(unit).sum())
            texts = self._duplicates.without(unit, self._selection, tally)
        else:
            duplicates, texts = 0, unit_documents(unit, self._selection, tally)
        before, after, number = int(layout.bos), int(layout.eos), -1
        try:
            for batch in _batches(texts):
                for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                    number += 1
                    if number % CHECK_EVERY == 0 and not tokenizer.is_right(text, ids):
                        raise EncoderDifference(f"{unit}: {difference(text)}")
                    document = np.empty(before + ids.size + after, dtype=self._dtype)
                    document[before : before + ids.size] = ids
                    if before:  # without bos, bos_id is -1, which an unsigned type cannot hold
                        document[0] = tokenizer.bos_id
                    if after:
                        document[-1] = tokenizer.eos_id
                    raw = text.encode()
                    series[split_of(raw, layout.validation, layout.test)].add(document, len(raw))
                    progress.add(len(raw), document.size)
            for one in series.values():
                one.close()
        except BaseException:
            for one in series.values():
                one.abort()
            raise
        counts = {"rows": tally.rows, "null": tally.null, "empty": tally.empty, "filtered": tally.filtered}
        shards = {split: one.shards for split, one in series.items()}
        rejected = [asdict(rejection) for rejection in tally.rejected]
        selected = {"dropped": dict(tally.dropped)} if self._selection.filters else {}
        return {
            "unit": unit.index,
            **counts,
            **selected,
            "duplicates": duplicates,
            "rejected": rejected,
            "shards": shards,
            "encoder": tokenizer.encoder_name,
        }


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
