"""Tests of ``data.answer_token``: which labels the loss counts, wherever a sample starts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lime_dist import load_config
from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.data.answers import Answers, find_answers
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.data.order import SampleOrder
from lime_dist.errors import LimeError

MakeDataset = Callable[..., Path]
MARK, EOS, LENGTH = 5, 2, 8


def slow_labels(row: list[int]) -> list[int]:
    """Labels of a row, token by token: an answer lasts from the mark to the eos token, which belongs to it."""
    labels, is_open = [], False
    for token, following in zip(row, row[1:], strict=False):
        if token == MARK:
            is_open = True
        elif token == EOS:
            is_open = False
        labels.append(following if is_open else IGNORED_LABEL)
    return labels


def test_labels_equal_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 12, size=(200, 31))
    labels = Answers(MARK, EOS).labels(rows)
    assert labels.shape == (200, 30) and labels.tolist() == [slow_labels(row) for row in rows.tolist()]
    assert 0.1 < (labels != IGNORED_LABEL).mean() < 0.9


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        ([7, 8, MARK, 3, 4, EOS, 9, MARK], [3, 4, EOS]),
        ([3, 4, EOS, 7, 8, MARK, 1, 1], [1, 1]),  # begins in an answer
        ([MARK, 3, EOS, 7, 8, 9, 9, 9], [3, EOS]),  # its mark is the first token
        ([EOS, 7, 8, MARK, 3, MARK, 4, EOS], [3, MARK, 4, EOS]),
        ([7, 8, 9, 9, 9, 9, 9, MARK], []),
    ],
)
def test_samples_that_start_anywhere(row: list[int], counted: list[int]) -> None:
    labels = Answers(MARK, EOS).labels(np.array([row]))[0]
    assert labels[labels != IGNORED_LABEL].tolist() == counted


@pytest.fixture
def folder(make_dataset: MakeDataset) -> Path:
    """Documents [7, 8, mark, 3, 4, eos] in two splits; the description says that documents end with eos."""
    documents = [np.array([7, 8, MARK, 3, 4, EOS])] * 60
    folder = make_dataset(train=[documents], validation=[documents[:20]])
    return describe(folder, settings={"eos": True})


def describe(folder: Path, **entries: object) -> Path:
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**facts, **entries}))
    return folder


def test_batches_count_answers_only(folder: Path) -> None:
    """Tokens and checksums are those of batches without answers; labels are a function of the sample."""
    split = TokenSplit(folder, "train")
    answers = find_answers(split, MARK)
    assert answers == Answers(MARK, EOS)
    order = SampleOrder(0, split.num_samples(LENGTH))
    plain, masked = (TrainBatches(split, order, LENGTH, 8, 4, 0, 1, 0, which) for which in (None, answers))
    for _ in range(6):
        (tokens, all_labels), (same, labels) = next(plain), next(masked)
        assert tokens.equal(same) and labels.is_contiguous() and plain.checksums == masked.checksums
        rows = [[*row, last[-1]] for row, last in zip(tokens.tolist(), all_labels.tolist(), strict=True)]
        assert labels.tolist() == [slow_labels(row) for row in rows]
    for stream in (plain, masked):
        stream.close()
    (first, *_) = ValidationBatches(TokenSplit(folder, "validation"), LENGTH, 4, 2, 0, 1, answers)
    assert first[1].tolist()[0] == [*[IGNORED_LABEL] * 2, 3, 4, EOS, *[IGNORED_LABEL] * 3]


def test_the_share_is_that_of_the_samples_asked_for(folder: Path) -> None:
    split, answers = TokenSplit(folder, "train"), Answers(MARK, EOS)
    wanted = [
        sum(label != IGNORED_LABEL for label in slow_labels(split.sample(i, LENGTH).tolist())) / LENGTH
        for i in range(44)
    ]
    assert answers.share(split, LENGTH, 5) == pytest.approx(sum(wanted[:5]) / 5)
    assert answers.share(split, LENGTH, 44) == pytest.approx(sum(wanted) / 44)
    assert answers.share(split, LENGTH, 44, measured=2) == pytest.approx((wanted[0] + wanted[43]) / 2)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    split = TokenSplit(folder, "train")
    assert find_answers(split, None) is None
    with pytest.raises(LimeError, match="no token follows data.answer_token=9 within a sample of 8 tokens"):
        Answers(9, EOS).share(split, LENGTH, 10)
    with pytest.raises(LimeError, match="data.answer_token=1000: .* has a vocabulary of 1000"):
        find_answers(split, 1000)
    with pytest.raises(LimeError, match="data.answer_token=2 is the eos of"):
        find_answers(split, EOS)
    with pytest.raises(LimeError, match=r"data.answer_token=5 needs data.path; it does not go with data.blend"):
        load_config(None, ["data.answer_token=5", "data.blend=[{path: a, weight: 1}]"])
    for entries in ({"settings": {"eos": False}}, {"settings": {}}, {"settings": {"eos": True}, "eos_id": -1}):
        with pytest.raises(LimeError, match="names none; give a folder made by data_tools.pretokenize without"):
            find_answers(TokenSplit(describe(folder, **entries), "train"), MARK)


def test_merged_folders_and_pairs(folder: Path, tmp_path: Path) -> None:
    """A merged folder ends documents with eos if all its parts do; a pair does not say."""
    describe(folder, settings=None, eos_id=EOS, merged=[{"settings": {"eos": True}}, {"settings": {"eos": True}}])
    assert TokenSplit(folder, "train").eos_id == EOS
    describe(folder, merged=[{"settings": {"eos": True}}, {"settings": None}])
    assert TokenSplit(folder, "train").eos_id is None
    with IndexedWriter(tmp_path / "pair", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.array([7, MARK, EOS]))
    with pytest.raises(LimeError, match="names none"):
        find_answers(TokenSplit(tmp_path / "pair", "train"), MARK)
