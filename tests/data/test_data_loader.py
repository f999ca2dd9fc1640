"""Tests of the training stream, which resumes exactly at any width, and of the validation set, which is always the same."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lime_dist.data.dataset import TokenSplit
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.data.order import SampleOrder
from lime_dist.errors import LimeError

MakeDataset = Callable[..., Path]
LENGTH = 8


@pytest.fixture
def split(make_dataset: MakeDataset) -> TokenSplit:
    # 40 samples of 8 tokens; sample i starts with token 8i
    return TokenSplit(make_dataset(train=[[np.arange(100)], [np.arange(100, 321)]]), "train")


def batches(
    split: TokenSplit, batch: int, micro: int, rank: int = 0, width: int = 1, consumed: int = 0
) -> TrainBatches:
    order = SampleOrder(7, split.num_samples(LENGTH))
    return TrainBatches(split, order, LENGTH, batch, micro, rank, width, consumed)


def take(stream: TrainBatches, micro_batches: int) -> torch.Tensor:
    return torch.cat([next(stream)[0] for _ in range(micro_batches)])


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "read-ahead"}


def test_labels_are_the_tokens_shifted_by_one(split: TokenSplit) -> None:
    tokens, labels = next(batches(split, 8, 4))
    assert tokens.shape == labels.shape == (4, LENGTH) and tokens.dtype == labels.dtype == torch.int64
    assert tokens.is_contiguous() and labels.is_contiguous()
    torch.testing.assert_close(labels, tokens + 1, rtol=0, atol=0)
    expected = SampleOrder(7, 40).samples_at(np.arange(4)) * LENGTH
    assert tokens[:, 0].tolist() == expected.tolist()


def test_resume_equals_straight(split: TokenSplit) -> None:
    straight_stream = batches(split, 8, 2)
    straight = [next(straight_stream) for _ in range(40)]  # ten steps: two epochs
    assert straight_stream.consumed_samples == 80
    resumed = batches(split, 8, 2, consumed=32)
    for expected, batch in zip(straight[16:], resumed, strict=False):
        for ours, theirs in zip(batch, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_consumed_samples_grows_with_whole_steps_and_can_be_set(split: TokenSplit) -> None:
    stream = batches(split, 8, 2)
    first = take(stream, 4)
    assert stream.consumed_samples == 8
    next(stream)
    assert stream.consumed_samples == 8  # a step under way does not count
    stream.consumed_samples = 0
    torch.testing.assert_close(take(stream, 4), first, rtol=0, atol=0)
    next(stream)
    stream.close()  # in the middle of a step: it begins again
    torch.testing.assert_close(take(stream, 4), take(batches(split, 8, 2, consumed=8), 4), rtol=0, atol=0)


def test_width_and_batch_split_can_change_midway(split: TokenSplit) -> None:
    first = [take(batches(split, 8, 2, rank, 2), 2 * 2) for rank in range(2)]  # two steps of 8 on two ranks
    then = [take(batches(split, 12, 1, rank, 4, consumed=16), 2 * 3) for rank in range(4)]  # two steps of 12 on four
    starts = sorted(torch.cat(first + then)[:, 0].tolist())
    assert starts == list(range(0, 320, 8))


def test_an_error_while_reading_reaches_the_consumer(split: TokenSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, read = batches(split, 8, 2), split.sample
    broken = int(SampleOrder(7, 40).sample_at(5))

    def sample(i: int, sequence_length: int) -> np.ndarray:
        if i == broken:
            raise OSError("disk on fire")
        return read(i, sequence_length)

    monkeypatch.setattr(split, "sample", sample)
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="disk on fire"):
        next(stream)
    monkeypatch.setattr(split, "sample", read)
    torch.testing.assert_close(take(stream, 4), take(batches(split, 8, 2), 4), rtol=0, atol=0)


def test_readers_end_when_closed_or_forgotten(split: TokenSplit) -> None:
    before = readers()
    streams = [batches(split, 8, 2) for _ in range(3)]
    for stream in streams:
        next(stream)
    ours = readers() - before
    assert len(ours) == 3
    streams[0].close()
    streams[1].consumed_samples = 0
    del streams, stream
    gc.collect()
    deadline = time.monotonic() + 5
    while ours & readers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not ours & readers()


def test_an_order_of_another_length_is_a_bug(split: TokenSplit) -> None:
    with pytest.raises(ValueError, match="over 39 samples, but the split has 40"):
        TrainBatches(split, SampleOrder(0, 39), LENGTH, 8, 2, 0, 1)
    with pytest.raises(LimeError, match="global_batch_size=9"):
        batches(split, 9, 2)


def test_validation_is_the_same_samples_in_order_every_time(split: TokenSplit) -> None:
    for width, micro in [(1, 4), (2, 3), (4, 1)]:
        ranks = [ValidationBatches(split, LENGTH, 12, micro, rank, width) for rank in range(width)]
        assert {len(rank) for rank in ranks} == {12 // (micro * width)}
        for _ in range(2):
            rounds = zip(*ranks, strict=True)  # micro-batch m of every rank, then m + 1
            starts = torch.cat([tokens[:, 0] for batch in rounds for tokens, _ in batch])
            assert starts.tolist() == list(range(0, 96, 8))


def test_an_impossible_validation_is_refused(split: TokenSplit) -> None:
    with pytest.raises(
        LimeError, match=r"evaluation_samples=10 is no multiple of .*micro_batch_size=4.*; give 8 or 12$"
    ):
        ValidationBatches(split, LENGTH, 10, 4, 0, 1)
    with pytest.raises(LimeError, match=r"evaluation_samples=5 is no multiple of .*; give 12, or 0 for no validation$"):
        ValidationBatches(split, LENGTH, 5, 4, 0, 3)
    with pytest.raises(LimeError, match=r"has 40 train samples of 8 tokens; use at most 36"):
        ValidationBatches(split, LENGTH, 48, 6, 0, 2)
    with pytest.raises(LimeError, match="evaluation_samples=0"):
        ValidationBatches(split, LENGTH, 0, 1, 0, 1)
