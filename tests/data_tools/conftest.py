"""A small corpus of many kinds of text, and a tokenizer trained on it once for all tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
