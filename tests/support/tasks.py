"""The shards of a synthetic task, made by the real commands, and the configuration of a run that learns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.exports import run_values

from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tasks.__main__ import main as tasks
from data_tools.tasks.documents import MARK
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as tokenizer


def make_shards(folder: Path, documents: int = 300) -> Path:
    """Make shards of arithmetic questions, a fifth of them for validation."""
    text, vocabulary, shards = str(folder / "text"), str(folder / "tokenizer"), folder / "shards"
    tasks(["arithmetic", "--output", text, "--documents", str(documents)])
    tokenizer(["train", "--input", text, "--output", vocabulary, "--vocab-size", "280", "--symbol", MARK])
    given = ["--input", text, "--tokenizer", vocabulary, "--output", str(shards), "--workers", "1"]
    pretokenize([*given, "--validation-fraction", "0.2"])
    return shards


def task_values(shards: Path, directory: Path, **model: Any) -> dict[str, Any]:
    """Return the configuration of a small model whose loss covers only the answers."""
    values = run_values(shards, directory, **{"vocab_size": 280, **model})
    mark = Tokenizer(shards / "tokenizer").facts["symbols"][MARK]
    return {**values, "data": {"path": str(shards), "sequence_length": 32, "answer_token": mark}}
