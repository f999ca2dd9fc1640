"""Tests of spike detection: neither noise nor the first losses are spikes, and spikes without a new best are counted."""

from __future__ import annotations

import math

from lime_dist.train.spikes import MAX_SPIKES, MIN_LOSSES, WINDOW, Spikes


def test_a_jump_is_a_spike_and_noise_is_not() -> None:
    spikes = Spikes(1.5)
    assert not spikes.is_spike(50.0), "there is nothing to compare with"
    for step in range(3 * WINDOW):
        assert not spikes.is_spike(8.0 - step / 50 + 0.3 * math.sin(step)), step
    assert spikes.is_spike(9.8)
    assert not spikes.is_spike(6.2), "a spike does not move the median"
    assert not spikes.is_spike(math.nan) and not spikes.is_spike(math.inf), "ignored"
    assert spikes.median < 7.0


def test_nothing_is_a_spike_without_a_factor_or_before_there_is_enough() -> None:
    without, early = Spikes(None), Spikes(2.0)
    for _ in range(20):
        assert not without.is_spike(1.0)
    assert not without.is_spike(100.0)
    for _ in range(MIN_LOSSES - 1):
        assert not early.is_spike(1.0)
    assert not early.is_spike(100.0)


def test_spikes_are_counted_until_there_is_a_new_best() -> None:
    spikes = Spikes(2.0)
    for _ in range(MIN_LOSSES):
        spikes.is_spike(1.0)
    for _ in range(MAX_SPIKES):
        assert spikes.is_spike(9.0) and not spikes.too_many
        assert not spikes.is_spike(1.1)
    assert not spikes.is_spike(0.9), "a new best"
    for _ in range(MAX_SPIKES):
        assert spikes.is_spike(9.0) and not spikes.too_many
    assert spikes.is_spike(9.0) and spikes.too_many
