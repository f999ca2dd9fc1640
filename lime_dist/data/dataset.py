"""One split of a pretokenized folder, seen as a single run of tokens that is cut into samples at read time."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from lime_dist.data.files import read_json, sha256_file
from lime_dist.data.indexed import IndexedDataset, pair_paths
from lime_dist.errors import LimeError

DATASET_FILE = "dataset.json"
FORMAT = "lime_dist dataset 1"
REWRITE = "run data_tools.pretokenize again, it rewrites what is damaged"


def read_dataset_json(folder: str | Path) -> dict[str, Any]:
    """The description of a finished pretokenized folder; LimeError if there is no folder, or it is not finished."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LimeError(f"{folder}: no such folder; give the --output of data_tools.pretokenize")
    hint = "give a folder that data_tools.pretokenize has finished, or run it again to finish this one"
    description = read_json(folder / DATASET_FILE, hint)
    if description.get("format") != FORMAT:
        raise LimeError(f"{folder / DATASET_FILE}: format is {description.get('format')!r}, not {FORMAT!r}; {hint}")
    return description


def check_shard_sizes(folder: Path, shard: dict[str, Any]) -> None:
    """A LimeError unless both files of a listed shard are there with the listed sizes."""
    for path, size in zip(pair_paths(folder / shard["name"]), (shard["bin_bytes"], shard["idx_bytes"]), strict=True):
        if not path.is_file():
            raise LimeError(f"{path}: missing, though {DATASET_FILE} lists it; {REWRITE}")
        if path.stat().st_size != size:
            raise LimeError(
                f"{path}: has {path.stat().st_size} bytes, but {DATASET_FILE} says {size}: truncated or changed; "
                + REWRITE
            )


def check_shard_hashes(folder: Path, shard: dict[str, Any]) -> None:
    """A LimeError unless both files of a listed shard have the listed SHA-256; reads every byte."""
    for path, kind in zip(pair_paths(folder / shard["name"]), ("bin", "idx"), strict=True):
        if sha256_file(path) != shard[f"{kind}_sha256"]:
            raise LimeError(
                f"{path}: its SHA-256 differs from the one in {DATASET_FILE}; delete it and run data_tools.pretokenize again"
            )


class TokenSplit:
    """The concatenated tokens of one split. Opening checks shards' sizes; ``data_tools.inspect --verify`` their hashes.

    Attributes: ``path``, ``split``, ``num_tokens``, ``num_documents``, ``vocab_size``, ``eos_id``, ``tokenizer_hash``.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        self.path, self.split = Path(path), split
        description = read_dataset_json(self.path)
        try:
            self._open(description, split)
        except (KeyError, TypeError, AttributeError) as error:
            raise LimeError(f"{self.path / DATASET_FILE} lacks what a dataset needs ({error!r}); {REWRITE}") from None

    def _open(self, description: dict[str, Any], split: str) -> None:
        if split not in description["splits"]:
            known = ", ".join(description["splits"])
            raise LimeError(f"{self.path}: no split {split!r}; it has {known}")
        self.vocab_size: int = description["vocab_size"]
        self.eos_id: int = description["eos_id"]
        self.tokenizer_hash: str = description["tokenizer_hash"]
        shards = description["splits"][split]["shards"]
        self.num_documents = sum(shard["documents"] for shard in shards)
        self._tokens: list[np.ndarray] = []
        self._starts: list[int] = []
        self.num_tokens = 0
        for shard in shards:
            check_shard_sizes(self.path, shard)
            # A plain array over the same mapping: slicing a memmap costs several times more than slicing an array.
            tokens = IndexedDataset(self.path / shard["name"]).tokens.view(np.ndarray)
            if tokens.size != shard["tokens"]:
                raise LimeError(
                    f"{self.path / shard['name']}.idx: lists {tokens.size} tokens, but {DATASET_FILE} says "
                    f"{shard['tokens']}; {REWRITE}"
                )
            self._tokens.append(tokens)
            self._starts.append(self.num_tokens)
            self.num_tokens += tokens.size

    def num_samples(self, sequence_length: int) -> int:
        """Whole samples of ``sequence_length`` tokens and the one that follows; LimeError if there is not even one."""
        samples = (self.num_tokens - 1) // sequence_length
        if samples < 1:
            raise LimeError(
                f"{self.path}: split {self.split!r} has {self.num_tokens} tokens, one sample needs "
                f"{sequence_length + 1}; lower data.sequence_length or give more text"
            )
        return samples

    def dropped_tokens(self, sequence_length: int) -> int:
        """Tokens at the end of the split that do not fill a sample."""
        return self.num_tokens - self.num_samples(sequence_length) * sequence_length - 1

    def sample(self, i: int, sequence_length: int) -> np.ndarray:
        """Tokens [iT : iT + T + 1] of the split, T = ``sequence_length``: a view if one shard holds them, else a copy.

        Neighbours share one token: the last target of sample i is the first input of sample i + 1.
        """
        start, end = i * sequence_length, (i + 1) * sequence_length + 1
        if i < 0 or end > self.num_tokens:
            raise IndexError(f"sample {i} of {(self.num_tokens - 1) // sequence_length}")
        shard = bisect_right(self._starts, start) - 1
        offset = start - self._starts[shard]
        piece = self._tokens[shard][offset : offset + end - start]
        if piece.size == end - start:
            return piece
        pieces, missing = [piece], end - start - piece.size
        while missing:
            shard += 1
            pieces.append(self._tokens[shard][:missing])
            missing -= pieces[-1].size
        return np.concatenate(pieces)
