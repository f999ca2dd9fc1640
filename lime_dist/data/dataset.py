"""One split of a dataset: its shards form one sequence of tokens, which is cut into samples when it is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lime_dist.data.files import read_json, sha256_file
from lime_dist.data.indexed import IndexedDataset, is_pair, pair_paths
from lime_dist.errors import LimeError

DATASET_FILE = "dataset.json"
FORMAT = "lime_dist dataset 1"
REWRITE = "run data_tools.pretokenize again; it rewrites damaged shards"


def read_dataset_json(folder: str | Path) -> dict[str, Any]:
    """The description of a pretokenized folder.

    Raises:
        LimeError: there is no such folder, it is a Megatron pair, or pretokenization has not finished.
    """
    folder = Path(folder)
    if is_pair(folder):
        raise LimeError(
            f"{folder}: is a Megatron .bin/.idx pair; only a folder made by data_tools.pretokenize has a {DATASET_FILE}, which "
            "says its tokenizer and its splits"
        )
    if folder.suffix in (".bin", ".idx") and folder.is_file():
        raise LimeError(
            f"{folder}: is one file of a Megatron .bin/.idx pair; give its prefix, {folder.with_suffix('')}"
        )
    if not folder.is_dir():
        raise LimeError(
            f"{folder}: no such folder, and no {folder}.bin; give the --output of data_tools.pretokenize, or the prefix of a "
            "Megatron .bin/.idx pair"
        )
    hint = (
        "give a folder that data_tools.pretokenize has finished, or run it again to finish this one; parts are joined by "
        "data_tools.merge"
    )
    description = read_json(folder / DATASET_FILE, hint)
    if description.get("format") != FORMAT:
        raise LimeError(f"{folder / DATASET_FILE}: format is {description.get('format')!r}, not {FORMAT!r}; {hint}")
    return description


def check_shard_sizes(folder: Path, shard: dict[str, Any], listed_in: str = DATASET_FILE) -> None:
    """Check that both files of a shard that the file ``listed_in`` lists exist and have the listed sizes.

    Raises:
        LimeError: one is missing or has another size.
    """
    for path, size in zip(pair_paths(folder / shard["name"]), (shard["bin_bytes"], shard["idx_bytes"]), strict=True):
        if not path.is_file():
            raise LimeError(f"{path}: missing, though {listed_in} lists it; {REWRITE}")
        if path.stat().st_size != size:
            raise LimeError(
                f"{path}: has {path.stat().st_size} bytes, but {listed_in} says {size}: truncated or changed; "
                + REWRITE
            )


def check_shard_hashes(folder: Path, shard: dict[str, Any], listed_in: str = DATASET_FILE) -> None:
    """Check that both files of a listed shard have the listed SHA-256. This reads every byte.

    Raises:
        LimeError: one has another hash.
    """
    for path, kind in zip(pair_paths(folder / shard["name"]), ("bin", "idx"), strict=True):
        if sha256_file(path) != shard[f"{kind}_sha256"]:
            raise LimeError(
                f"{path}: its SHA-256 differs from the one in {listed_in}; delete it and run data_tools.pretokenize again"
            )


class Samples(Protocol):
    """A source of samples: a `TokenSplit`, or a `Blend` of several."""

    path: Any
    split: str
    vocab_size: int | None

    @property
    def parts(self) -> Sequence[TokenSplit]:
        """The datasets from which samples come."""
        ...

    def num_samples(self, sequence_length: int) -> int: ...

    def sample(self, i: int, sequence_length: int) -> np.ndarray: ...


class TokenSplit:
    """The concatenated tokens of one split of a pretokenized folder, or of a Megatron-LM or GPT-NeoX ``.bin``/``.idx`` pair.

    Opening checks the sizes of shards; ``data_tools.inspect --verify`` checks their hashes. A pair has no splits: its last
    documents, a fraction of ``validation_fraction``, are the validation split; with 1, all of them. A pair does not state its
    vocabulary either, so the tokens of each sample are compared with ``vocab_size`` when it is read.

    Attributes:
        path: the folder, or the prefix of the pair.
        split: name of the split.
        num_tokens, num_documents: size of the split.
        vocab_size, tokenizer_hash: of the tokenizer; None for a pair.
        eos_id: the token that ends every document; None if that is not known.
        shard_hashes: of each shard, the number of tokens and the SHA-256 of its .bin file; None if they are not known.
    """

    def __init__(
        self, path: str | Path, split: str, validation_fraction: float = 0.01, vocab_size: int | None = None
    ) -> None:
        self.path, self.split = Path(path), split
        self.vocab_size: int | None = None
        self.tokenizer_hash: str | None = None
        self.eos_id: int | None = None
        self._largest_token: int | None = None
        self._is_pair = is_pair(path)
        self.shard_hashes: list[tuple[int, str]] | None = None
        self._tokens: list[np.ndarray] = []
        self._starts: list[int] = []
        self.num_tokens = 0
        if self._is_pair:
            self._largest_token = None if vocab_size is None else vocab_size - 1
            self._open_pair(validation_fraction)
            return
        description = read_dataset_json(self.path)
        try:
            self._open(description, split)
        except (KeyError, TypeError, AttributeError) as error:
            raise LimeError(f"{self.path / DATASET_FILE} lacks what a dataset needs ({error!r}); {REWRITE}") from None

    def _open_pair(self, validation_fraction: float) -> None:
        if self.split not in ("train", "validation"):
            raise LimeError(f"{self.path}: no split {self.split!r}; a .bin/.idx pair has train, validation")
        pair = IndexedDataset(self.path)
        if pair.dtype.kind not in "iu":
            raise LimeError(f"{self.path}.idx: its tokens are {pair.dtype}, not integers; give a corpus of token ids")
        first_held_out = min(len(pair) - 1, round(len(pair) * (1 - validation_fraction)))
        if first_held_out < 1 and validation_fraction < 1:
            raise LimeError(f"{self.path}: {len(pair)} documents are too few to hold some of them out for validation")
        border = int(pair.lengths[: pair.document_bounds[first_held_out]].sum(dtype=np.int64))
        tokens = pair.tokens.view(np.ndarray)
        held_out = self.split == "validation"
        self.num_documents = len(pair) - first_held_out if held_out else first_held_out
        self._tokens, self._starts = [tokens[border:] if held_out else tokens[:border]], [0]
        self.num_tokens = self._tokens[0].size

    def _open(self, description: dict[str, Any], split: str) -> None:
        if split not in description["splits"]:
            known = ", ".join(description["splits"])
            raise LimeError(f"{self.path}: no split {split!r}; it has {known}")
        self.vocab_size = description["vocab_size"]
        self.tokenizer_hash = description["tokenizer_hash"]
        parts = description.get("merged", [description])
        if description.get("eos_id", -1) >= 0 and all((part.get("settings") or {}).get("eos") for part in parts):
            self.eos_id = description["eos_id"]
        shards = description["splits"][split]["shards"]
        self.num_documents = sum(shard["documents"] for shard in shards)
        if all("bin_sha256" in shard for shard in shards):
            self.shard_hashes = [(shard["tokens"], shard["bin_sha256"]) for shard in shards]
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

    @property
    def parts(self) -> Sequence[TokenSplit]:
        return (self,)

    @property
    def tokens(self) -> list[np.ndarray]:
        """The tokens of each shard."""
        return self._tokens

    def num_samples(self, sequence_length: int) -> int:
        """Number of whole samples: ``sequence_length`` tokens and the one that follows.

        Raises:
            LimeError: there is not even one.
        """
        samples = (self.num_tokens - 1) // sequence_length
        if samples < 1:
            raise LimeError(
                f"{self.path}: split {self.split!r} has {self.num_tokens} tokens, one sample needs "
                f"{sequence_length + 1}; {self._how_to_enlarge()}"
            )
        return samples

    def _how_to_enlarge(self) -> str:
        if self.split != "validation":
            return "lower data.sequence_length or give more text"
        larger = "data.validation_fraction" if self._is_pair else "--validation-fraction of data_tools.pretokenize"
        shorter = "lower data.sequence_length, " if self.num_tokens > 1 else ""
        return f"{shorter}raise {larger}, or set train.evaluation_samples=0 to train without validation"

    def sample(self, i: int, sequence_length: int) -> np.ndarray:
        """Tokens [iT : iT + T + 1] of the split with T = ``sequence_length``: a view if one shard holds them, else a copy.

        Neighbouring samples share one token: the last target of sample i is the first input of sample i + 1.
        """
        start, end = i * sequence_length, (i + 1) * sequence_length + 1
        if i < 0 or end > self.num_tokens:
            raise IndexError(f"sample {i} of {(self.num_tokens - 1) // sequence_length}")
        shard = bisect_right(self._starts, start) - 1
        offset = start - self._starts[shard]
        piece = self._tokens[shard][offset : offset + end - start]
        if piece.size == end - start:
            return self._checked(piece, i)
        pieces, missing = [piece], end - start - piece.size
        while missing:
            shard += 1
            pieces.append(self._tokens[shard][:missing])
            missing -= pieces[-1].size
        return self._checked(np.concatenate(pieces), i)

    def _checked(self, tokens: np.ndarray, i: int) -> np.ndarray:
        if self._largest_token is not None and not 0 <= tokens.min() <= tokens.max() <= self._largest_token:
            raise LimeError(
                f"{self.path}.bin: sample {i} holds tokens {tokens.min()} to {tokens.max()}, but "
                f"model.vocab_size={self._largest_token + 1}; set model.vocab_size to that of the corpus's tokenizer"
            )
        return tokens
