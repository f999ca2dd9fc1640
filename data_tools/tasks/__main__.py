"""``python -m data_tools.tasks arithmetic`` and ``graph``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_tools.common import command_parser, disk_errors
from data_tools.tasks.arithmetic import Arithmetic
from data_tools.tasks.documents import DOCUMENTS, MARK, Task, complete, write_documents
from data_tools.tasks.graph import Graph
from lime_dist.data.files import lock_folder
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import expand


def run(options: argparse.Namespace) -> None:
    """Run either sub-command."""
    names = {"arithmetic": ("operands", "largest"), "graph": ("concepts", "hops", "names")}[options.task]
    values = {name: getattr(options, name) for name in names}
    task: Task = Arithmetic(**values) if options.task == "arithmetic" else Graph(**values)
    for name, least in (("documents", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise LimeError(f"--{name} {getattr(options, name)}: must be at least {least}")
    settings = {"task": options.task, **values, "documents": options.documents, "seed": options.seed}
    output = Path(options.output)
    with disk_errors("fix this and run the same command again"), lock_folder(output):
        reused = not options.fresh and complete(output, settings)
        if not reused:
            write_documents(output, task, options.documents, options.seed, settings)
    print(f"{options.task} {'complete, reused' if reused else 'written'}: {options.documents:,} documents in {output}")


def add_task(commands: Any, name: str, about: str, option: str) -> argparse.ArgumentParser:
    """Add a sub-command with the options that all tasks share."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example:\n  python -m data_tools.tasks {name} --output data/{name}/text {option}",
    )
    parser.add_argument("--output", type=expand, required=True, help=f"folder for {DOCUMENTS}")
    parser.add_argument("--documents", type=int, default=100_000, help="default 100000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--fresh", action="store_true", help="write the documents again, even if the folder holds some")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.tasks``."""
    parser = command_parser(
        "tasks",
        f"Write questions with worked solutions, question{MARK}solution, as JSONL. The same seed gives the same bytes.",
        "python -m data_tools.tasks arithmetic --output data/arithmetic/text --documents 200000 --operands 4\n"
        f"  python -m data_tools.tokenizer train --input data/arithmetic/text --output data/arithmetic/tokenizer \\\n"
        f"    --vocab-size 320 --symbol '{MARK}'",
    )
    commands = parser.add_subparsers(dest="task", required=True)
    arithmetic = add_task(
        commands, "arithmetic", "nested expressions such as 2*(3+4), reduced level by level", "--operands 4"
    )
    arithmetic.add_argument("--operands", type=int, default=4, help="numbers in an expression (default 4)")
    arithmetic.add_argument(
        "--largest", type=int, default=20, help="largest number, intermediate results included (default 20)"
    )
    graph = add_task(commands, "graph", "which of two made-up concepts a person is, by a chain of facts", "--hops 3")
    graph.add_argument("--concepts", type=int, default=12, help="concepts in a question (default 12)")
    graph.add_argument("--hops", type=int, default=3, help="facts in the chain (default 3)")
    graph.add_argument(
        "--names", type=int, default=64, help="made-up words from which concepts take their names (default 64)"
    )
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
