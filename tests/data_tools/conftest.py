"""A small corpus of many kinds of text, and a tokenizer trained on it once for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub import Hub
from support.hub_client import NAME, README, use_hub

from data_tools.sources import hub_requests
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as tokenizer_command

ODD_TEXTS = [
    "emoji 😀 👩‍👩‍👧‍👦 and 漢字かな한글, العربية",
    "tabs\tand\r\nlines\n\n\n   indented,  two  spaces and a trailing one ",
    "control \0\x01\x1f\x7f\u0085\u2028\ufeff characters",
    "\u2581marks\u2581 of \u2581\u2581 sentencepiece <s></s><0x41> \u2047",
    "a very long word: " + "x" * 5000,
]


def make_texts(count: int, seed: int) -> list[str]:
    """Documents of 20 to 300 made-up words each; every tenth ends with a text from ODD_TEXTS."""
    generator = np.random.default_rng(seed)
    letters = np.asarray(list("abcdefghijklmnoprstuvw"))
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(1, 9, size=800)]
    texts = []
    for number in range(count):
        chosen = generator.integers(0, len(words), size=int(generator.integers(20, 300)))
        text = f"Document {seed}-{number}.\n" + " ".join(words[i] for i in chosen)
        texts.append(text if number % 10 else text + ODD_TEXTS[number // 10 % len(ODD_TEXTS)])
    return texts


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 2, column: str = "text") -> None:
    """Write a parquet file with a text column, a score column and page checksums."""
    table = pa.table({column: pa.array(texts, pa.string()), "score": [1.0] * len(texts)})
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True, compression="none")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two parquet files and a JSONL file, 320 documents of about 800 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "a.parquet", list(make_texts(120, 1)))
    (folder / "inner").mkdir()
    write_parquet(folder / "inner" / "b.parquet", list(make_texts(120, 2)))
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(make_texts(80, 3))]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE tokenizer of 500 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_command(["train", "--input", str(corpus), "--output", str(folder), "--vocab-size", "500"])
    return folder


@pytest.fixture(scope="session")
def trained(tokenizer_folder: Path) -> Tokenizer:
    """The tokenizer, opened."""
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What is in the repository: two files of data, one sample, and what is neither."""
    root = tmp_path / "repository"
    for number, path in enumerate(["data/CC-1/a.parquet", "data/CC-2/b.parquet", "sample/10BT/000.parquet"]):
        (root / path).parent.mkdir(parents=True)
        texts = [f"text {i} of file {number} {'with some words ' * 20}" for i in range(300)]
        table = pa.table({"text": texts, "score": [float(i % 5) for i in range(300)]})
        pq.write_table(table, root / path, row_group_size=50, write_page_checksum=True, compression="none")
    (root / "README.md").write_text(README)
    (root / "figures.csv").write_text("1,2\n")
    return root


@pytest.fixture
def hub(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(NAME) as server:
        server.commit(data)
        use_hub(monkeypatch, server.url, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that this process makes between requests, which are left out."""
    made: list[float] = []
    monkeypatch.setattr(hub_requests.time, "sleep", made.append)
    return made
