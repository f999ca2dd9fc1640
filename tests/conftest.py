"""Fixtures that several test folders share."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.collector import freeze_imported
from support.workers import WorkerGroup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def young_garbage_alone() -> None:
    freeze_imported()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let SIGINT through to the processes that tests start. A shell that runs the tests in the background ignores it for them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerGroup]]:
    """``workers(n)``: the session's group of n processes, started on first use and again if a case killed it."""
    groups: dict[int, WorkerGroup] = {}

    def get(size: int) -> WorkerGroup:
        if size not in groups or not groups[size].alive:
            groups[size] = WorkerGroup(size)
        return groups[size]

    yield get
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of a small corpus, made by the real commands."""
    folder = tmp_path_factory.mktemp("dataset")
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma".split()
    generator = random.Random(0)
    with (folder / "documents.jsonl").open("w") as file:
        for _ in range(400):
            text = " ".join(generator.choice(words) for _ in range(generator.randint(20, 80)))
            file.write(json.dumps({"text": text}) + "\n")
    for command in (
        f"data_tools.tokenizer train --input {folder}/documents.jsonl --output {folder}/tokenizer --vocab-size 320",
        f"data_tools.pretokenize --input {folder}/documents.jsonl --tokenizer {folder}/tokenizer "
        f"--output {folder}/shards --validation-fraction 0.1",
    ):
        subprocess.run([sys.executable, "-m", *command.split()], check=True, cwd=ROOT, capture_output=True)
    return folder / "shards"
