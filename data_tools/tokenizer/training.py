"""Train a sentencepiece model on an even sample of the input; it is accepted only if texts survive encoding and decoding."""

from __future__ import annotations

import argparse
import io
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_tools.common import disk_errors, progress_bar
from data_tools.sources.documents import read_file
from data_tools.sources.footers import read_footers
from data_tools.sources.inputs import INPUT_HELP, HubInputFile, InputFile, fingerprint, list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.facts import tokenizer_facts
from data_tools.tokenizer.folder import existing_facts, replace_folder, write_scratch
from data_tools.tokenizer.pieces import SPACE_MARK, cut
from data_tools.tokenizer.round_trip import HARD_TEXTS, first_failure
from data_tools.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from lime_dist.data.files import lock_folder
from lime_dist.errors import LimeError
from lime_dist.paths import expand

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
TRAINING_CHARACTERS = 1000
"""sentencepiece silently skips training sentences over 4192 bytes; a character has at most 4 bytes."""

CHECKED_DOCUMENTS = 1000
SAMPLED_FILES = 300
"""Of a dataset of the hub with more files, only so many are read."""


def file_budgets(sizes: list[int], budget: int) -> list[int]:
    """Share ``budget`` bytes equally among files; what small files do not use goes to larger ones."""
    budgets, left = [0] * len(sizes), budget
    for finished, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        budgets[i] = min(sizes[i], left // (len(sizes) - finished))
        left -= budgets[i]
    return budgets


def sample_files(files: list[InputFile], seed: int) -> list[InputFile]:
    """At most SAMPLED_FILES of a hub dataset's files: one at random from each of as many stretches of equal length."""
    if len(files) <= SAMPLED_FILES or not isinstance(files[0], HubInputFile):
        return files
    generator = np.random.default_rng([seed, len(files)])
    borders = [len(files) * stretch // SAMPLED_FILES for stretch in range(SAMPLED_FILES + 1)]
    chosen = [files[int(generator.integers(first, end))] for first, end in pairwise(borders)]
    print(
        f"hub: {SAMPLED_FILES:,} of {len(files):,} files are sampled, from {chosen[0].name} to {chosen[-1].name} (--seed {seed})"
    )
    return chosen


def sample_documents(
    files: list[InputFile], text_column: str, budget: int, seed: int, tally: Tally
) -> Iterator[tuple[str, int]]:
    """Yield (text, bytes of the budget that it uses) of documents sampled evenly over the files.

    A parquet file's row groups are read in random order until the file's budget is used up. A JSONL file's documents are
    kept with the probability that uses up its budget. A file's random numbers depend only on the seed and its index.
    Of many files of the hub, some are sampled; see `sample_files`.
    """
    every_file, files = len(files), sample_files(files, seed)
    # At most a fourth of the budget comes from one row group, so that no single one represents the file.
    share = 0.25 if len(files) == every_file else 1.0  # sampled files are so many that one each is enough
    groups = list(read_footers(files, text_column))
    sizes = [sum(group) if file.is_parquet else file.text_bytes for file, group in zip(files, groups, strict=True)]
    for i, (file, left) in enumerate(zip(files, file_budgets(sizes, budget), strict=True)):
        generator = np.random.default_rng([seed, i])
        parts: list[tuple[int, int] | None] = [None]
        keep = min(1.0, 1.1 * left / max(1, sizes[i]))
        if file.is_parquet:
            parts = [(int(group), int(group) + 1) for group in generator.permutation(len(groups[i]))]
            keep = min(1.0, max(keep, share * left / max(1, max(groups[i], default=1))))
        for part in parts:
            for _, text in read_file(file, text_column, tally, part):
                if left > 0 and generator.random() < keep:
                    size = len(text.encode())
                    yield text, min(size, left)
                    left -= size
            if left <= 0:
                break


def train_model(texts: Iterator[str], vocab_size: int, model_type: str, symbols: Sequence[str] = ()) -> bytes:
    """Train on texts, cut so that none is skipped, and return the content of a model file.

    Args:
        symbols: texts that are always encoded as one token.

    Raises:
        LimeError: training fails; the message includes sentencepiece's reason.
    """
    pieces = (
        piece for text in texts for piece in cut(text.replace("\0", "").replace(SPACE_MARK, ""), TRAINING_CHARACTERS)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n", *symbols],
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=1,  # unigram pieces depend on the number of threads
            shuffle_input_sentence=False,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "there is too little text"
        advice = "raise --vocab-size" if "smaller than required" in reason else "lower --vocab-size or give more text"
        raise LimeError(f"sentencepiece cannot train {vocab_size} pieces on this input: {reason}; {advice}") from None
    return model.getvalue()


def write_tokenizer(
    files: list[InputFile], output: Path, options: argparse.Namespace, training: dict[str, Any]
) -> None:
    """Sample, train, check and write; ``output`` stays as it is unless every checked text survives encoding and decoding."""
    start, tally, budget = time.perf_counter(), Tally(), int(options.sample_megabytes * 1e6)
    texts: list[str] = []
    with progress_bar(budget, "sampling text") as bar:
        for text, size in sample_documents(files, options.text_column, budget, options.seed, tally):
            texts.append(text)
            bar.update(size)
        bar.total = bar.n
    for rejection in tally.rejected[:10]:
        print(f"not used: {rejection}")
    if not texts:
        raise LimeError(f"--input {options.input}: no text in column {options.text_column!r}; give --text-column")
    size = sum(len(text.encode()) for text in texts)
    print(
        f"training {options.vocab_size} {options.model_type} pieces on {size / 1e6:.1f} MB, {len(texts):,} documents …"
    )
    # Input without a space yields no piece for it, and it cannot fall back to bytes, as the model sees the space mark.
    space = [] if any(" " in text for text in texts) else [SPACE_MARK]
    model = train_model(iter(texts), options.vocab_size, options.model_type, [*options.symbol, *space])
    encoder = SentencePieceEncoder(model)
    symbols = {symbol: encoder.token_id(symbol) for symbol in options.symbol}
    facts = tokenizer_facts(encoder, "sentencepiece", model, encoder.special_ids, training=training)
    if symbols:
        facts["symbols"] = symbols
    scratch = write_scratch(output, model, facts)
    checked = texts[:: max(1, len(texts) // CHECKED_DOCUMENTS)]
    tokenizer = Tokenizer(scratch)
    beside = [
        f"{left}{symbol}{right}" for symbol in symbols for left in ("", "a", "7 ") for right in ("", symbol, " b")
    ]
    failure = first_failure(tokenizer, [*HARD_TEXTS, *checked, *beside])
    if failure is not None:
        shutil.rmtree(scratch)
        raise LimeError(f"the trained tokenizer changes this text and is rejected: {failure[:80]!r}")
    replace_folder(scratch, output)
    seconds = time.perf_counter() - start
    print(f"tokenizer written to {output} in {seconds:.1f} s; {len(checked):,} documents are decoded exactly")
    for symbol, number in symbols.items():
        print(f"symbol {symbol}: always the single token {number}")


def reusable(output: Path, training: dict[str, Any], fresh: bool) -> bool:
    """Whether the folder holds a complete tokenizer with this ``training``.

    Raises:
        LimeError: it holds another tokenizer.
    """
    facts = existing_facts(output)
    if facts is None or fresh:
        return False
    trained = facts.get("training") or {}
    keys = dict.fromkeys([*training, "symbols"])  # recorded only if there are any
    different = [key for key in keys if trained.get(key) != training.get(key)]
    if different:
        kind = f"trained with other {' and '.join(different)}" if trained else "that was imported"
        raise LimeError(f"{output}: holds a tokenizer {kind}; give another --output, or --fresh to replace it")
    Tokenizer(output)
    return True


def add_arguments(commands: Any) -> None:
    """Add the sub-command with its options."""
    about = (
        "Train on an even sample of the input: no normalisation, byte fallback, single digits, white space preserved."
    )
    example = "python -m data_tools.tokenizer train --input data/embedded --output data/tokenizer --vocab-size 4096"
    parser = commands.add_parser(
        "train",
        help=about,
        description=about,
        epilog=f"example:\n  {example}",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--input", type=expand, required=True, help=INPUT_HELP)
    parser.add_argument("--output", type=expand, required=True, help="folder for the tokenizer")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="pieces, the 256 bytes, 5 symbols and each --symbol included"
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe")
    parser.add_argument("--text-column", default="text", help="default: text")
    parser.add_argument("--sample-megabytes", type=float, default=32.0, help="text to train on (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument(
        "--symbol",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that is always encoded as one token; may be repeated",
    )
    parser.add_argument("--fresh", action="store_true", help="train again, even if the folder holds a tokenizer")


def check_symbols(symbols: Sequence[str]) -> None:
    """Check the symbols.

    Raises:
        LimeError: a symbol cannot stay one token in a text, exists already, or is given twice.
    """
    for symbol in symbols:
        if not symbol.isprintable() or " " in symbol or SPACE_MARK in symbol or not symbol:
            raise LimeError(f"--symbol {symbol!r}: must be printable characters without spaces")
        if symbol in ("<unk>", "<s>", "</s>", "<pad>") or re.fullmatch("<0x[0-9A-F]{2}>", symbol):
            raise LimeError(f"--symbol {symbol}: the tokenizer has a piece of this name; give another one")
    if len(set(symbols)) < len(symbols):
        raise LimeError(f"--symbol {' --symbol '.join(symbols)}: a symbol is given twice")


def run(options: argparse.Namespace) -> None:
    """``python -m data_tools.tokenizer train``."""
    check_symbols(options.symbol)
    if options.vocab_size < 262 or options.sample_megabytes <= 0 or options.seed < 0:
        raise LimeError("--vocab-size must be at least 262, --sample-megabytes above 0, --seed at least 0")
    files, output = list_inputs(options.input), Path(options.output)
    training = {
        key: getattr(options, key) for key in ("vocab_size", "model_type", "text_column", "sample_megabytes", "seed")
    }
    if options.symbol:
        training["symbols"] = options.symbol
    training["inputs"] = [fingerprint(file) for file in files]
    with disk_errors("fix this and run the same command again"), lock_folder(output):
        if reusable(output, training, options.fresh):
            print(f"tokenizer complete, reused: {options.vocab_size} pieces in {output}")
            return
        write_tokenizer(files, output, options, training)
