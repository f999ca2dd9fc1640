"""Protects tokenizer folders of earlier versions, whose facts have the name of a Hugging Face file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.old_tokenizers import copy_as_old, rename_facts
from support.vocabularies import gpt_2

from data_tools import inspect, merge
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as tokenizer_command
from data_tools.tokenizer.facts import FACTS_FILE, OLD_FACTS_FILE
from lime_dist.errors import LimeError


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(trained: Tokenizer, tmp_path: Path) -> Path:
    return copy_as_old(trained.folder, tmp_path / "old")


def test_an_old_folder_is_the_same_tokenizer(old: Path, trained: Tokenizer) -> None:
    assert not (old / FACTS_FILE).exists()
    opened = Tokenizer(old)
    assert opened.hash == trained.hash and opened.facts == trained.facts
    assert opened.encode("some text").tolist() == trained.encode("some text").tolist()


def test_an_old_folder_with_an_imported_tokenizer(tmp_path: Path) -> None:
    gpt_2().save(str(tmp_path / "tokenizer.json"))
    tokenizer_command(["import", "--model", str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / "imported")])
    expected = Tokenizer(tmp_path / "imported").hash
    assert Tokenizer(copy_as_old(tmp_path / "imported", tmp_path / "old")).hash == expected


def test_training_reuses_or_replaces_an_old_folder(
    old: Path, corpus: Path, trained: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(old)
    command = ["train", "--input", str(corpus), "--output", str(old), "--vocab-size", "500"]
    tokenizer_command(command)
    assert "complete, reused" in capsys.readouterr().out and content(old) == before
    with pytest.raises(LimeError, match="trained with other seed; give another --output"):
        tokenizer_command([*command, "--seed", "1"])
    tokenizer_command([*command, "--fresh"])
    assert Tokenizer(old).hash == trained.hash
    assert sorted(content(old)) == [".lock", "tokenizer.model", FACTS_FILE]


def test_the_commands_take_old_folders(
    old: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretokenizing gives the same bytes; datasets with an old folder inside are reused, inspected and merged."""

    def write_shards(tokenizer: Path, output: Path) -> None:
        common = ["--input", str(corpus / "c.jsonl"), "--workers", "1"]
        pretokenize([*common, "--tokenizer", str(tokenizer), "--output", str(output)])

    write_shards(tokenizer_folder, tmp_path / "shards")
    write_shards(old, tmp_path / "shards-of-old")
    expected = content(tmp_path / "shards")
    assert content(tmp_path / "shards-of-old") == expected
    rename_facts(tmp_path / "shards" / "tokenizer")
    capsys.readouterr()
    write_shards(old, tmp_path / "shards")
    assert "dataset complete, reused" in capsys.readouterr().out
    inspect.main([str(tmp_path / "shards"), "--verify"])
    assert "files have the size and SHA-256" in capsys.readouterr().out
    merge.main([str(tmp_path / "shards"), "--output", str(tmp_path / "merged")])
    assert {path.name for path in (tmp_path / "merged" / "tokenizer").iterdir()} == {"tokenizer.model", FACTS_FILE}
    (tmp_path / "shards" / "dataset.json").unlink()  # as if a kill had interrupted an earlier version
    write_shards(old, tmp_path / "shards")
    assert content(tmp_path / "shards") == expected


def test_a_hugging_face_file_beside_the_facts_stays(tokenizer_folder: Path, trained: Tokenizer, tmp_path: Path) -> None:
    """The name is free for it now."""
    foreign = json.dumps({"model": {}})
    trained.copy_to(tmp_path)
    (tmp_path / OLD_FACTS_FILE).write_text(foreign)
    assert Tokenizer(tmp_path).hash == trained.hash
    trained.copy_to(tmp_path)
    assert (tmp_path / OLD_FACTS_FILE).read_text() == foreign
    (tmp_path / FACTS_FILE).unlink()
    with pytest.raises(LimeError, match=r"tokenizer.json: not a tokenizer of this program; give the --output of data_"):
        Tokenizer(tmp_path)
