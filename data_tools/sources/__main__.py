"""``python -m data_tools.sources embedded``."""

from __future__ import annotations

from data_tools.common import command_parser
from data_tools.sources import embedded
from lime_dist.errors import run_command


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the sub-command."""
    parser = command_parser(
        "sources",
        "Gather text without a download, as parquet with FineWeb-Edu's columns.",
        "python -m data_tools.sources embedded --output data/embedded",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    embedded.add_arguments(commands)
    embedded.run(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
