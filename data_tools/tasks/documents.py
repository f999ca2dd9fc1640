"""Write questions with worked solutions as JSONL documents ``question<answer>solution``.

OUT/documents.jsonl    one {"text": …} per line, no question twice
OUT/task.json          the settings and the SHA-256 of the documents; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.common import progress_bar
from data_tools.tasks.arithmetic import Arithmetic
from data_tools.tasks.graph import Graph
from lime_dist.data.files import json_bytes, read_json, sha256_file, write_atomic
from lime_dist.errors import LimeError

MARK = "<answer>"
"""Separates a question from its solution; pass it to the tokenizer as ``--symbol``."""

FORMAT = "lime_dist task 1"
DOCUMENTS, FACTS = "documents.jsonl", "task.json"
MAX_REPEATS = 1000
"""After this many repeated questions in a row, hardly any new ones are left."""

Task = Arithmetic | Graph


def draw_documents(task: Task, seed: int) -> Iterator[str]:
    """Yield documents endlessly, no question twice.

    Raises:
        LimeError: hardly any new questions are left.
    """
    generator, seen, repeats = random.Random(seed), set[bytes](), 0
    while True:
        question, solution = task.draw(generator)
        key = hashlib.blake2b(question.encode(), digest_size=16).digest()
        if key in seen:
            repeats += 1
            if repeats == MAX_REPEATS:
                raise LimeError(
                    f"--documents: these settings give little more than {len(seen):,} different questions; lower --documents, "
                    "or make the questions larger"
                )
            continue
        repeats = 0
        seen.add(key)
        yield f"{question}{MARK}{solution}"


def write_documents(output: Path, task: Task, count: int, seed: int, settings: dict[str, Any]) -> None:
    """Write both files; an exception leaves earlier ones as they are."""
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
        (output / FACTS).unlink(missing_ok=True)  # they describe the old documents
        temporary.replace(output / DOCUMENTS)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {"format": FORMAT, "mark": MARK, "settings": settings, "sha256": sha256_file(output / DOCUMENTS)}
    write_atomic(output / FACTS, json_bytes(facts))


def complete(output: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder already holds the complete documents of these settings.

    Raises:
        LimeError: it holds something else.
    """
    if not (output / FACTS).exists():
        if (output / DOCUMENTS).exists():
            raise LimeError(
                f"{output}: holds a {DOCUMENTS} without {FACTS}; give another --output, or --fresh to replace it"
            )
        return False
    facts = read_json(output / FACTS, "give another --output, or --fresh to replace it")
    if facts.get("format") != FORMAT or facts.get("settings") != settings:
        raise LimeError(
            f"{output}: holds documents with other settings; give another --output, or --fresh to replace them"
        )
    path = output / DOCUMENTS
    if not path.is_file() or sha256_file(path) != facts.get("sha256"):
        print(f"{path} is missing or changed; writing it again")
        return False
    return True
