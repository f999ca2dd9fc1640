"""Tests of the sample order: each sample once per epoch, evenly shuffled, for any width and any change of width."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from lime_dist.data.order import SampleOrder, rank_positions
from lime_dist.errors import LimeError

PINNED = [84187463, 458532199, 648549152]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 100, 1000, 1023, 1024, 1025, 4097, 30011])
def test_an_epoch_is_a_permutation(size: int) -> None:
    for epoch in (0, 1, 7):
        samples = SampleOrder(3, size).samples_at(epoch * size + np.arange(size))
        np.testing.assert_array_equal(np.sort(samples), np.arange(size))


def test_epochs_and_seeds_differ_and_the_same_seed_repeats() -> None:
    size, positions = 500, np.arange(500)
    first = SampleOrder(1, size).samples_at(positions)
    others = [SampleOrder(1, size).samples_at(size + positions), SampleOrder(2, size).samples_at(positions)]
    for other in others:
        assert np.count_nonzero(first == other) < 20  # 1 expected by chance
    np.testing.assert_array_equal(first, SampleOrder(1, size).samples_at(positions))


def test_the_order_is_pinned() -> None:
    """A change of the order would change what every resumed run reads next."""
    assert SampleOrder(1234, 10**9).samples_at(np.asarray([0, 1, 10**9])).tolist() == PINNED


def test_access_is_random_and_shape_is_kept() -> None:
    order = SampleOrder(5, 97)
    straight = order.samples_at(np.arange(400))
    positions = np.random.default_rng(0).integers(0, 400, size=(6, 7))
    np.testing.assert_array_equal(order.samples_at(positions), straight[positions])
    assert [order.sample_at(p) for p in (0, 96, 97, 399)] == straight[[0, 96, 97, 399]].tolist()
    with pytest.raises(ValueError, match="negative"):
        order.sample_at(-1)


def test_a_billion_samples_need_no_memory() -> None:
    samples = SampleOrder(0, 10**9).samples_at(np.arange(0, 10**9, 10**5))
    assert len(np.unique(samples)) == 10**4 and samples.min() >= 0 and samples.max() < 10**9
    # evenly spread: 10 bins of 1000, standard deviation 30
    assert np.abs(np.bincount(samples // 10**8, minlength=10) - 1000).max() < 150


def excess(counts: np.ndarray, expected: float) -> float:
    """Distance of chi-square from its mean in standard deviations; about 0 ± 1 for a uniform distribution."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_all_orders_of_a_few_samples_are_equally_likely() -> None:
    """The 720 orders of six samples over 7,200 seeds. With 8 rounds instead of 12 the value is 20 or more."""
    orders = Counter(tuple(SampleOrder(seed, 6).samples_at(np.arange(6)).tolist()) for seed in range(7200))
    counts = np.asarray([orders[order] for order in permutations(range(6))])
    assert abs(excess(counts, 10)) < 4


def test_every_sample_is_equally_likely_at_every_position_and_the_test_can_fail() -> None:
    size, epochs = 31, 3000
    table = SampleOrder(9, size).samples_at(np.arange(size * epochs)).reshape(epochs, size)

    def unevenness(samples: np.ndarray) -> float:
        return max(excess(np.bincount(column, minlength=size), epochs / size) for column in samples.T)

    assert unevenness(table) < 5  # the largest of 31
    biased = table.copy()
    biased[::10].sort(axis=1)  # every tenth epoch in order
    assert unevenness(biased) > 20


def test_neighbours_are_independent() -> None:
    """Successive samples of an epoch have no fixed distance, as they would in a linear congruential order."""
    size = 10007
    steps = np.diff(SampleOrder(2, size).samples_at(np.arange(size))) % size
    assert np.bincount(steps).max() < 12  # 1 expected; chance of 12 is below 1e-6


def step_samples(consumed: int, batch: int, micro: int, width: int) -> list[int]:
    ranks = [rank_positions(consumed, batch, micro, rank, width) for rank in range(width)]
    assert all(rank.shape == (batch // (micro * width), micro) for rank in ranks)
    return sorted(np.concatenate([rank.ravel() for rank in ranks]).tolist())


@pytest.mark.parametrize(("width", "micro"), [(1, 1), (1, 24), (2, 3), (3, 2), (4, 6), (24, 1), (8, 3)])
def test_ranks_together_read_each_position_once(width: int, micro: int) -> None:
    assert step_samples(48, 24, micro, width) == list(range(48, 72))


def test_the_documented_formula() -> None:
    assert rank_positions(100, 12, 2, 1, 3).tolist() == [[102, 103], [108, 109]]


def test_changing_width_and_batch_split_midway_repeats_and_skips_nothing() -> None:
    size, consumed, read = 360, 0, list[int]()
    order = SampleOrder(4, size)
    for batch, micro, width in [(24, 2, 3), (24, 4, 2), (12, 1, 4), (36, 3, 1), (24, 1, 24)] * 6:
        read += order.samples_at(np.asarray(step_samples(consumed, batch, micro, width))).tolist()
        consumed += batch
    assert consumed == 2 * size
    assert sorted(read[:size]) == sorted(read[size:]) == list(range(size))


def test_a_batch_that_does_not_factor_is_refused() -> None:
    with pytest.raises(LimeError, match=r"train.global_batch_size=10 .*micro_batch_size=2 .*width 2"):
        rank_positions(0, 10, 2, 0, 2)
    with pytest.raises(LimeError):
        rank_positions(0, 4, 4, 0, 2)
