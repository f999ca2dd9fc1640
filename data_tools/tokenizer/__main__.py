"""``python -m data_tools.tokenizer train`` and ``import``."""

from __future__ import annotations

from data_tools.common import command_parser
from data_tools.tokenizer import importing, training
from lime_dist.errors import run_command


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the sub-command."""
    parser = command_parser(
        "tokenizer",
        "Train a sentencepiece tokenizer that reproduces every text exactly, or import an existing one.\n"
        "Each command has its own --help.",
        "python -m data_tools.tokenizer train --input data/embedded --output data/tokenizer --vocab-size 4096\n"
        "  python -m data_tools.tokenizer import --model gpt2/tokenizer.json --output data/tokenizer",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training.add_arguments(commands)
    importing.add_arguments(commands)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    run_command(main)
