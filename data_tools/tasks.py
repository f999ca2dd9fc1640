"""Write questions with worked solutions as JSONL: documents ``question<answer>solution`` to fine-tune and measure a model on.

OUT/documents.jsonl    {"text": …} a line, no question twice
OUT/task.json          the settings, and the SHA-256 of the documents; written last
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.common import command_parser, disk_errors, progress_bar
from data_tools.tasks_arithmetic import Arithmetic
from data_tools.tasks_graph import Graph
from lime_dist.data.files import json_bytes, lock_folder, read_json, sha256_file, write_atomic
from lime_dist.errors import LimeError, run_command

MARK = "<answer>"
"""Between a question and its solution; give it to the tokenizer as ``--symbol``."""

FORMAT = "lime_dist task 1"
DOCUMENTS, FACTS = "documents.jsonl", "task.json"
MAX_REPEATS = 1000
"""Questions in a row that were all there already: then there are hardly any others."""

Task = Arithmetic | Graph


def draw_documents(task: Task, seed: int) -> Iterator[str]:
    """Documents without end, no question twice. LimeError when there are hardly any questions left."""
    generator, seen, repeats = random.Random(seed), set[bytes](), 0
    while True:
        question, solution = task.draw(generator)
        key = hashlib.blake2b(question.encode(), digest_size=16).digest()
        if key in seen:
            repeats += 1
            if repeats == MAX_REPEATS:
                raise LimeError(
                    f"--documents: these settings give little more than {len(seen):,} different questions; lower it, or make "
                    "questions larger"
                )
            continue
        repeats = 0
        seen.add(key)
        yield f"{question}{MARK}{solution}"


def write_documents(output: Path, task: Task, count: int, seed: int, settings: dict[str, Any]) -> None:
    """Write both files; an exception leaves those that were there before."""
    temporary = output / f".{DOCUMENTS}.{os.getpid()}.tmp"
    documents = draw_documents(task, seed)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            with progress_bar(count, str(settings["task"]), unit=" documents") as bar:
                for _ in range(count):
                    file.write(json.dumps({"text": next(documents)}) + "\n")
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
        (output / FACTS).unlink(missing_ok=True)  # never the facts of other documents
        temporary.replace(output / DOCUMENTS)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {"format": FORMAT, "mark": MARK, "settings": settings, "sha256": sha256_file(output / DOCUMENTS)}
    write_atomic(output / FACTS, json_bytes(facts))


def complete(output: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the documents of this very call, whole; LimeError if it holds something else."""
    if not (output / FACTS).exists():
        if (output / DOCUMENTS).exists():
            raise LimeError(
                f"{output}: holds a {DOCUMENTS} without {FACTS}; give another --output, or --fresh to replace it"
            )
        return False
    facts = read_json(output / FACTS, "give another --output, or --fresh to replace it")
    if facts.get("format") != FORMAT or facts.get("settings") != settings:
        raise LimeError(
            f"{output}: holds documents of other settings; give another --output, or --fresh to replace them"
        )
    path = output / DOCUMENTS
    if not path.is_file() or sha256_file(path) != facts.get("sha256"):
        print(f"{path} is missing or changed: it is written again")
        return False
    return True


def run(options: argparse.Namespace) -> None:
    """Both sub-commands."""
    names = {"arithmetic": ("operands", "largest"), "graph": ("concepts", "hops", "names")}[options.task]
    values = {name: getattr(options, name) for name in names}
    task: Task = Arithmetic(**values) if options.task == "arithmetic" else Graph(**values)
    for name, least in (("documents", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise LimeError(f"--{name} {getattr(options, name)}: must be at least {least}")
    settings = {"task": options.task, **values, "documents": options.documents, "seed": options.seed}
    output = Path(options.output)
    with disk_errors("put this right and run the same command again"), lock_folder(output):
        there = not options.fresh and complete(output, settings)
        if not there:
            write_documents(output, task, options.documents, options.seed, settings)
    print(f"{options.task} {'complete, reused' if there else 'written'}: {options.documents:,} documents in {output}")


def add_task(kinds: Any, name: str, about: str, option: str) -> argparse.ArgumentParser:
    """A sub-command with what all tasks have."""
    kind: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example:\n  python -m data_tools.tasks {name} --output data/{name}/text {option}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_argument("--output", required=True, help=f"folder for {DOCUMENTS}")
    kind.add_argument("--documents", type=int, default=100_000, help="default 100000")
    kind.add_argument("--seed", type=int, default=0, help="default 0")
    kind.add_argument("--fresh", action="store_true", help="write again, whatever the folder holds")
    return kind


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.tasks``."""
    parser = command_parser(
        "tasks",
        f"Write questions with worked solutions, question{MARK}solution, as JSONL. The same seed gives the same bytes.",
        "python -m data_tools.tasks arithmetic --output data/arithmetic/text --documents 200000 --operands 4\n"
        f"  python -m data_tools.tokenizer train --input data/arithmetic/text --output data/arithmetic/tokenizer \\\n"
        f"    --vocab-size 320 --symbol '{MARK}'",
    )
    kinds = parser.add_subparsers(dest="task", required=True)
    arithmetic = add_task(
        kinds, "arithmetic", "nested expressions, reduced level by level, like 2*(3+4)", "--operands 4"
    )
    arithmetic.add_argument("--operands", type=int, default=4, help="numbers in an expression (default 4)")
    arithmetic.add_argument("--largest", type=int, default=20, help="largest number, also on the way (default 20)")
    graph = add_task(kinds, "graph", "which of two made-up concepts is somebody, by a chain of facts", "--hops 3")
    graph.add_argument("--concepts", type=int, default=12, help="concepts in a question (default 12)")
    graph.add_argument("--hops", type=int, default=3, help="facts of the chain (default 3)")
    graph.add_argument("--names", type=int, default=64, help="made-up words to name concepts with (default 64)")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
