"""``python -m data_tools.pretokenize``."""

from __future__ import annotations

import os

from data_tools.common import command_parser, disk_errors
from data_tools.pretokenize.dataset import pretokenize
from data_tools.sources.filters import WHERE_HELP
from data_tools.sources.inputs import INPUT_HELP
from data_tools.tokenizer.encoder_choice import ENCODER_HELP, ENCODERS
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import expand


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.pretokenize``."""
    parser = command_parser(
        "pretokenize",
        "Encode parquet or JSONL text into Megatron .bin/.idx shards; a hash of each document decides its split.\n"
        "If the command is killed, running it again finishes the rest. Messages count rows from 1.",
        "python -m data_tools.pretokenize --input data/embedded --tokenizer data/tokenizer --output data/shards\n"
        "  python -m data_tools.pretokenize --input hub:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer data/tokenizer \\\n"
        "    --output data/fineweb --where 'score>=3' --where 'token_count>=64' --drop-duplicates\n"
        "  python -m data_tools.pretokenize --input data/text --tokenizer data/tokenizer --output data/part-3 --part 3/8\n"
        "  python -m data_tools.pretokenize --input data/text --tokenizer data/tokenizer --output data/shards \\\n"
        "    --encoder sentencepiece",
    )
    parser.add_argument("--input", type=expand, required=True, help=INPUT_HELP)
    parser.add_argument("--tokenizer", type=expand, required=True, help="folder made by data_tools.tokenizer")
    parser.add_argument("--output", type=expand, required=True, help="folder for the shards and dataset.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--encoder", choices=ENCODERS, default="auto", help=ENCODER_HELP)
    parser.add_argument("--text-column", default="text", help="default: text")
    parser.add_argument("--where", action="append", default=[], metavar="CONDITION", help=WHERE_HELP)
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="keep only the first of identical texts; reads the input twice, needs little memory",
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default 0.01)"
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.0, help="share of documents for a third split, test (default 0)"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="maximum tokens per shard (default 67108864)")
    parser.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="shuffle the documents within each shard (default: keep the order of the input)",
    )
    parser.add_argument("--bos", action="store_true", help="begin documents with bos")
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with eos")
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="bad rows: count and report them (default), or stop",
    )
    parser.add_argument(
        "--max-rejected", type=float, default=0.01, help="fail if a larger share of rows or files is bad (default 0.01)"
    )
    parser.add_argument(
        "--part",
        metavar="NUMBER/COUNT",
        help="write only this part of the shards, such as 3/8, into a folder of its own; data_tools.merge joins all parts into "
        "what one command would have written; with --drop-duplicates, every part reads the whole input once",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="recompute the hashes of the shards that are finished, and write damaged ones again",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the folder's shards and start again")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.shard_tokens < 1:
        raise LimeError("--workers and --shard-tokens must be at least 1")
    fractions = (options.validation_fraction, options.test_fraction)
    if min(fractions) < 0 or sum(fractions) >= 1 or not 0 <= options.max_rejected <= 1:
        raise LimeError(
            "--validation-fraction and --test-fraction must not be negative and must add up to less than 1; "
            "--max-rejected must be in [0, 1]"
        )
    if options.shuffle is not None and options.shuffle < 0:
        raise LimeError("--shuffle takes a seed, an integer of at least 0")
    with disk_errors("finished shards are kept, fix this and run the same command again"):
        pretokenize(options)


if __name__ == "__main__":
    run_command(main)
