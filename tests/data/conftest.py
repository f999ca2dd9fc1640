"""Pretokenized folders made without data_tools, so that reading is tested apart from writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lime_dist.data.dataset import FORMAT
from lime_dist.data.indexed import IndexedWriter, pair_paths

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset(train=[[document, …] of shard 0, …], validation=…, vocab_size=…) -> folder."""

    def make(vocab_size: int = 1000, **splits: list[list[np.ndarray]]) -> Path:
        described = {}
        for split, shards in splits.items():
            listed = []
            for number, documents in enumerate(shards):
                name = f"{split}-{number:05d}-00"
                with IndexedWriter(tmp_path / name, np.uint16) as writer:
                    for document in documents:
                        writer.add_document(document)
                bin_path, idx_path = pair_paths(tmp_path / name)
                sizes = {"bin_bytes": bin_path.stat().st_size, "idx_bytes": idx_path.stat().st_size}
                listed.append({"name": name, "tokens": writer.tokens, "documents": writer.documents, **sizes})
            described[split] = {"shards": listed}
        facts = {"format": FORMAT, "vocab_size": vocab_size, "eos_id": 2, "tokenizer_hash": "0" * 64}
        (tmp_path / "dataset.json").write_text(json.dumps({**facts, "splits": described}))
        return tmp_path

    return make
