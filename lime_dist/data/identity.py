"""What identifies training data, wherever they lie: of each dataset, in order, its counts and a hash of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lime_dist.data.blend import Blend
from lime_dist.data.dataset import Samples, TokenSplit

PROBES, PROBE_TOKENS = 64, 1 << 15


@dataclass(frozen=True)
class DatasetIdentity:
    """What identifies the training split of one dataset.

    Attributes:
        path: where it lies, for the reader; the same data may lie elsewhere.
        sha256: of its tokens: from the hashes in dataset.json, or as `hash_tokens`.
    """

    path: str
    tokens: int
    documents: int
    sha256: str

    @property
    def content(self) -> tuple[int, str]:
        """What two datasets have in common that give the same samples."""
        return self.tokens, self.sha256

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens with hash {self.sha256[:8]}"


@dataclass(frozen=True)
class DataIdentity:
    """What a checkpoint records of the training data.

    Attributes:
        num_samples: of all datasets.
        datasets: in the order of ``data.blend``; empty if it is not known.
    """

    num_samples: int
    datasets: tuple[DatasetIdentity, ...] = ()

    @classmethod
    def of(cls, training: Samples, sequence_length: int) -> DataIdentity:
        """Identify opened training data."""
        splits = training.splits if isinstance(training, Blend) else [training]
        datasets = tuple(_identify(split) for split in splits if isinstance(split, TokenSplit))
        return cls(training.num_samples(sequence_length), datasets)

    @classmethod
    def recorded(cls, num_samples: int, datasets: Sequence[dict[str, Any]] | None) -> DataIdentity:
        """What `as_list` has written; None comes from a version that did not record datasets."""
        return cls(num_samples, tuple(DatasetIdentity(**values) for values in datasets or ()))

    def as_list(self) -> list[dict[str, Any]] | None:
        """The datasets as JSON values."""
        return [asdict(dataset) for dataset in self.datasets] or None


def _identify(split: TokenSplit) -> DatasetIdentity:
    hashes = split.shard_hashes
    if hashes is None:
        sha256 = hash_tokens(split.tokens)
    else:
        sha256 = hashlib.sha256("".join(f"{size} {sha256}\n" for size, sha256 in hashes).encode()).hexdigest()
    return DatasetIdentity(str(split.path), split.num_tokens, split.num_documents, sha256)


def hash_tokens(shards: Sequence[np.ndarray]) -> str:
    """SHA-256 of the tokens of all shards, whatever their type; of a shard with more than 2 million, of 64 evenly spread
    pieces of 32,768."""
    digest = hashlib.sha256()
    for tokens in shards:
        starts = np.arange(0, tokens.size, PROBE_TOKENS)
        if len(starts) > PROBES:
            starts = np.linspace(0, tokens.size - PROBE_TOKENS, PROBES).astype(np.int64)
        for start in starts.tolist():
            digest.update(tokens[start : start + PROBE_TOKENS].astype("<i8").data)
    return digest.hexdigest()
