"""Tests of how a split is cut into samples: nothing between shards is lost, and a damaged folder is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lime_dist.data.dataset import TokenSplit
from lime_dist.data.indexed import HEADER, MAGIC, VERSION
from lime_dist.errors import LimeError

MakeDataset = Callable[..., Path]


@pytest.fixture
def folder(make_dataset: MakeDataset) -> Path:
    # 40 tokens: shards of 17, 0, 3 and 20, so that a sample of 9 + 1 can span three of them
    shards = [[np.arange(10), np.arange(10, 17)], [], [np.arange(17, 20)], [np.arange(20, 40)]]
    return make_dataset(train=shards, validation=[[np.arange(4)]])


def test_samples_are_cut_across_shards(folder: Path) -> None:
    split = TokenSplit(folder, "train")
    assert (split.num_tokens, split.num_documents, split.vocab_size) == (40, 4, 1000)
    for length in range(1, 40):
        samples = split.num_samples(length)
        assert samples == 39 // length
        for i in range(samples):
            np.testing.assert_array_equal(split.sample(i, length), np.arange(i * length, (i + 1) * length + 1))
        for i in (-1, samples):
            with pytest.raises(IndexError):
                split.sample(i, length)


def test_a_sample_inside_one_shard_is_not_copied(folder: Path) -> None:
    sample = TokenSplit(folder, "train").sample(0, 9)
    assert sample.dtype == np.uint16 and not sample.flags.owndata and not sample.flags.writeable


def test_too_short_for_one_sample(folder: Path) -> None:
    split = TokenSplit(folder, "validation")
    assert split.num_samples(3) == 1
    with pytest.raises(LimeError, match=r"'validation' has 4 tokens, one sample needs 5; lower data.sequence_length"):
        split.num_samples(4)


@pytest.mark.parametrize("sequences", ["none", "empty"])
@pytest.mark.parametrize("empty", ["validation", "train"])
def test_a_pair_whose_documents_of_a_split_are_empty(tmp_path: Path, sequences: str, empty: str) -> None:
    """Their documents have no sequences, as Megatron writes them, or sequences without tokens. Both splits say what they lack."""
    full, none = [6] * 3, ([0] * 3 if sequences == "empty" else [])
    lengths = np.asarray([*full, *none] if empty == "validation" else [*none, *full], "<i4")
    per_document = [1] * 3 + [1 if none else 0] * 3
    bounds = np.cumsum([0, *(per_document if empty == "validation" else per_document[::-1])]).astype("<i8")
    offsets = (np.cumsum([0, *lengths[:-1]]) * 2).astype("<i8")
    header = HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(bounds))
    (tmp_path / "p.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())
    (tmp_path / "p.bin").write_bytes(np.arange(18, dtype="<u2").tobytes())
    for split in ("train", "validation"):
        opened = TokenSplit(tmp_path / "p", split, 0.5)
        assert (opened.num_documents, opened.num_tokens) == (3, 0 if split == empty else 18)
        if split == empty:
            advice = (
                "give more text"
                if split == "train"
                else "p: .*; raise data.validation_fraction, or set train.evaluation_samples=0"
            )
            with pytest.raises(LimeError, match=advice):
                opened.num_samples(4)
        else:
            np.testing.assert_array_equal(opened.sample(1, 4), np.arange(4, 9))


def test_a_small_validation_split_says_how_to_enlarge_it(make_dataset: MakeDataset) -> None:
    folder = make_dataset(train=[[np.arange(9)]], validation=[])
    with pytest.raises(
        LimeError, match="has 0 tokens, one sample needs 5; raise --validation-fraction of data_tools.pretokenize, or"
    ):
        TokenSplit(folder, "validation").num_samples(4)


def test_something_missing_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LimeError, match="no split 'test'; it has train, validation"):
        TokenSplit(folder, "test")
    with pytest.raises(LimeError, match="no such folder"):
        TokenSplit(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LimeError, match=r"dataset.json: no such file; give a folder that data_tools.pretokenize"):
        TokenSplit(tmp_path / "empty", "train")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(LimeError, match=r"dataset.json: cannot be read"):
        TokenSplit(folder, "train")
    (folder / "dataset.json").write_text('{"format": "other"}')
    with pytest.raises(LimeError, match="format is 'other'"):
        TokenSplit(folder, "train")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_shard_that_is_missing_or_changed_is_named(folder: Path, suffix: str) -> None:
    shard = folder / f"train-00002-00.{suffix}"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(LimeError, match=f"train-00002-00.{suffix}: has .* but dataset.json says"):
        TokenSplit(folder, "train")
    shard.unlink()
    with pytest.raises(LimeError, match=f"train-00002-00.{suffix}: missing"):
        TokenSplit(folder, "train")


def test_counts_that_disagree_with_the_shard_are_refused(folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_text())
    facts["splits"]["train"]["shards"][0]["tokens"] += 1
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(LimeError, match="lists 17 tokens, but dataset.json says 18"):
        TokenSplit(folder, "train")
