"""Protects merging: files are linked where possible, and datasets that do not match are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools import inspect, merge
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tokenizer import Tokenizer
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.indexed import IndexedWriter
from lime_dist.errors import LimeError


@pytest.fixture
def folders(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> list[Path]:
    """Two datasets with the same tokenizer; the second has a test split."""
    given = [(corpus / "a.parquet", []), (corpus / "c.jsonl", ["--test-fraction", "0.2"])]
    for number, (path, options) in enumerate(given):
        common = f"--input {path} --tokenizer {tokenizer_folder} --output {tmp_path / str(number)} --workers 1"
        pretokenize([*common.split(), "--validation-fraction", "0.1", *options])
    return [tmp_path / "0", tmp_path / "1"]


def test_a_merged_folder_holds_everything_in_order(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*map(str, folders), "--output", str(tmp_path / "both")]
    merge.main(given)
    facts = json.loads((tmp_path / "both" / "dataset.json").read_text())
    parts = [json.loads((folder / "dataset.json").read_text()) for folder in folders]
    assert facts["counts"]["rows"] == 200 and [part["source"] for part in facts["merged"]] == [
        part["source"] for part in parts
    ]
    for split in ("train", "validation"):
        whole, halves = TokenSplit(tmp_path / "both", split), [TokenSplit(folder, split) for folder in folders]
        assert whole.num_tokens == sum(half.num_tokens for half in halves)
        expected = np.concatenate([half.sample(0, half.num_tokens - 1) for half in halves])
        np.testing.assert_array_equal(whole.sample(0, whole.num_tokens - 1), expected)
    assert facts["splits"]["test"]["documents"] == parts[1]["splits"]["test"]["documents"] > 0
    shard = parts[0]["splits"]["train"]["shards"][0]["name"]
    linked = tmp_path / "both" / f"train-m00-{shard.removeprefix('train-')}.bin"
    assert os.path.samefile(linked, folders[0] / f"{shard}.bin")
    output = capsys.readouterr().out
    assert (
        f"train: {TokenSplit(tmp_path / 'both', 'train').num_tokens:,} tokens" in output and str(folders[1]) in output
    )
    inspect.main([str(tmp_path / "both"), "--verify"])
    assert "files have the size and SHA-256" in capsys.readouterr().out
    merge.main(given)
    assert "complete, reused" in capsys.readouterr().out


def test_datasets_that_do_not_match_are_refused(
    folders: list[Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LimeError, match="is one of the folders to merge"):
        merge.main([*map(str, folders), "--output", str(folders[0])])
    path = folders[1] / "dataset.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "tokenizer_hash": "0"}))
    with pytest.raises(LimeError, match="tokenizer_hash is 0.*only datasets of the same tokenizer can be merged"):
        merge.main([*map(str, folders), "--output", str(tmp_path / "both")])
    path.write_text(json.dumps(facts))
    merge.main([str(folders[0]), "--output", str(tmp_path / "both")])
    with pytest.raises(LimeError, match="holds another dataset"):
        merge.main([*map(str, folders), "--output", str(tmp_path / "both")])
    victim = next(folders[0].glob("train-*.idx"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(LimeError, match="truncated or changed"):
        merge.main([*map(str, folders), "--output", str(tmp_path / "third")])
    assert not (tmp_path / "third" / "dataset.json").exists()
    assert Tokenizer(folders[0] / "tokenizer").vocab_size == 500


def test_files_are_copied_if_the_file_system_cannot_link(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(merge.os, "link", refuse)
    merge.main([*map(str, folders), "--output", str(tmp_path / "both")])
    assert TokenSplit(tmp_path / "both", "train").num_tokens > 0


def test_a_megatron_pair_is_shown_and_cannot_be_merged(
    folders: list[Path], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["first document", "", "the third and last one"]
    tokenizer, prefix = Tokenizer(tokenizer_folder), tmp_path / "corpus_text_document"
    documents = [tokenizer.encode(text) for text in texts]
    with IndexedWriter(prefix, np.int32) as writer:
        for document in documents:
            writer.add_document(document)
    capsys.readouterr()
    inspect.main([str(prefix)])
    said = capsys.readouterr().out
    total, ids = sum(map(len, documents)), np.concatenate(documents)
    assert f"{total} tokens as int32, 3 documents, 3 sequences" in said
    assert f"token ids {ids.min()} to {ids.max()}" in said and f"lengths in tokens: 0 to {len(documents[2])}" in said
    assert f"document 0: {' '.join(map(str, documents[0].tolist()))}" in said
    inspect.main([str(prefix), "--tokenizer", str(tokenizer_folder)])
    assert f"document 2: {texts[2]}" in capsys.readouterr().out
    for command, words in [
        (lambda: inspect.main([str(prefix), "--verify"]), "pair, which has no hashes; leave out --verify"),
        (
            lambda: inspect.main([f"{prefix}.idx"]),
            f"is one file of a Megatron .bin/.idx pair; give its prefix, {prefix}",
        ),
        (lambda: inspect.main([str(folders[0]), "--tokenizer", "x"]), "has its own tokenizer"),
        (
            lambda: merge.main([str(folders[0]), str(prefix), "--output", str(tmp_path / "m")]),
            "pair, which says neither its tokenizer nor its splits.*list it under data.blend",
        ),
    ]:
        with pytest.raises(LimeError, match=words):
            command()
    assert not (tmp_path / "m").exists()
