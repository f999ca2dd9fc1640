"""Show the content of a pretokenized folder, and check every byte of it against its hashes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import command_parser, progress_bar
from data_tools.tokenizer import Tokenizer
from lime_dist.data.dataset import DATASET_FILE, check_shard_hashes, check_shard_sizes, read_dataset_json
from lime_dist.data.indexed import IndexedDataset, is_pair
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import expand

BAR_WIDTH = 40
SAMPLES, SAMPLE_TOKENS = 3, 64


def verify(folder: Path, description: dict[str, Any]) -> int:
    """Recompute the hash of every file and return the number of files.

    Raises:
        LimeError: a file differs; the message names the first one.
    """
    tokenizer = Tokenizer(folder / description["tokenizer"])
    if tokenizer.hash != description["tokenizer_hash"]:
        raise LimeError(
            f"{tokenizer.folder}: not the tokenizer that {DATASET_FILE} names; pretokenize again with --fresh"
        )
    shards = [shard for split in description["splits"].values() for shard in split["shards"]]
    with progress_bar(sum(shard["bin_bytes"] + shard["idx_bytes"] for shard in shards), "verify") as bar:
        for shard in shards:
            check_shard_sizes(folder, shard)
            check_shard_hashes(folder, shard)
            bar.update(shard["bin_bytes"] + shard["idx_bytes"])
    return 2 * len(shards)


def histogram(lengths: np.ndarray) -> str:
    """A histogram of document lengths [documents] in tokens, binned by powers of two, as lines of text."""
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    rows = [
        f"  {2**power:>9,} – {2 ** (power + 1) - 1:<9,} {count:>9,} {'█' * -(-BAR_WIDTH * count // counts.max())}"
        for power, count in enumerate(counts.tolist())
        if count
    ]
    return "\n".join(rows)


def show_documents(shards: Sequence[IndexedDataset], tokenizer: Tokenizer | None) -> None:
    """Print the document lengths and the beginnings of a few documents: as text, or without a tokenizer as token ids."""
    lengths = np.concatenate([document_lengths(shard) for shard in shards])
    middle, longest = int(np.median(lengths)), int(lengths.max())
    print(f"document lengths in tokens: {lengths.min()} to {longest:,}, median {middle:,}")
    print(histogram(lengths))
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    for number in np.linspace(0, len(lengths) - 1, min(SAMPLES, len(lengths))).astype(int).tolist():
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        ids = shards[shard].document(number - int(starts[shard]))[:SAMPLE_TOKENS]
        text = " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids)
        print(f"document {number}: {textwrap.shorten(text, 200, placeholder=' …')}")


def document_lengths(shard: IndexedDataset) -> np.ndarray:
    """Tokens of each document, int64 [documents]; a document may have several sequences, or none."""
    ends = np.concatenate([[0], np.cumsum(shard.lengths, dtype=np.int64)])
    return np.diff(ends[shard.document_bounds])


def show_split(folder: Path, split: str, facts: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Print the counts and the documents of one split."""
    print(
        f"\n{split}: {facts['tokens']:,} tokens, {facts['documents']:,} documents, {len(facts['shards'])} shards, "
        f"{facts['tokens'] / max(1, facts['text_bytes']):.4f} tokens per byte of text"
    )
    if facts["documents"]:
        show_documents([IndexedDataset(folder / shard["name"]) for shard in facts["shards"]], tokenizer)


def show_pair(prefix: Path, tokenizer: Tokenizer | None) -> None:
    """Print the counts and the documents of a Megatron pair."""
    pair = IndexedDataset(prefix)
    print(f"{prefix}: a Megatron .bin/.idx pair; it does not say its tokenizer, and training cuts it into splits")
    print(f"{pair.tokens.size:,} tokens as {pair.dtype.name}, {len(pair):,} documents, {pair.lengths.size:,} sequences")
    if pair.tokens.size:
        print(f"token ids {pair.tokens.min()} to {pair.tokens.max()}")
    if len(pair):
        show_documents([pair], tokenizer)


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.inspect``."""
    parser = command_parser(
        "inspect",
        "Show the counts, document lengths and a few documents of a pretokenized folder or of a Megatron .bin/.idx pair.",
        "python -m data_tools.inspect data/shards --verify",
    )
    parser.add_argument(
        "folder", type=expand, metavar="DIR", help="the --output of data_tools.pretokenize, or the prefix of a pair"
    )
    parser.add_argument(
        "--tokenizer", type=expand, metavar="DIR", help="decode the documents of a pair, which else are shown as ids"
    )
    parser.add_argument("--verify", action="store_true", help="recompute every hash; exit with status 2 if one differs")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    if is_pair(folder):
        if options.verify:
            raise LimeError(f"--verify: {folder} is a Megatron .bin/.idx pair, which has no hashes; leave out --verify")
        show_pair(folder, Tokenizer(options.tokenizer) if options.tokenizer else None)
        return
    if options.tokenizer:
        raise LimeError(f"--tokenizer: {folder} has its own tokenizer; leave out --tokenizer")
    description = read_dataset_json(folder)
    if options.verify:
        print(f"verified: {verify(folder, description)} files have the size and SHA-256 that {DATASET_FILE} lists")
    tokenizer = Tokenizer(folder / description["tokenizer"])
    counts = description["counts"]
    print(f"{folder}: from {description['source']}, written by version {description['tool_version']}")
    print(f"tokenizer: {tokenizer.vocab_size} pieces, hash {tokenizer.hash[:16]}, tokens as {description['dtype']}")
    print(", ".join(f"{key} {value:,}" for key, value in counts.items()))
    for split, facts in description["splits"].items():
        for shard in facts["shards"]:
            check_shard_sizes(folder, shard)
        show_split(folder, split, facts, tokenizer)


if __name__ == "__main__":
    run_command(main)
