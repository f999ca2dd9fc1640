"""The order of samples: a pure function of (seed, position), computed for any position without storing a permutation.

Positions 0, 1, 2, … count the samples that a run reads. Position p lies in epoch p // num_samples, and every epoch has its own
permutation: a keyed Feistel network over a × b ≥ num_samples points. With x = l·b + r, each round adds a hash of one half to
the other, modulo a or b; that is a bijection for any hash. A result outside the num_samples points goes through the network
again until it lies inside (cycle walking), so the network is also a bijection of the num_samples points.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Protocol

import numpy as np

from lime_dist.errors import LimeError

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's finaliser
ROUNDS = 12  # with 10, some of the 720 orders of six samples come too often; tests/data/test_data_order.py measures it


def _mix_int(value: int) -> int:
    value &= MASK
    value = ((value ^ (value >> 30)) * MULTIPLIERS[0]) & MASK
    value = ((value ^ (value >> 27)) * MULTIPLIERS[1]) & MASK
    return value ^ (value >> 31)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 [n]. Products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    state = _mix_int(_mix_int(seed + GOLDEN) ^ _mix_int(epoch * GOLDEN + MULTIPLIERS[1]))
    return tuple(np.uint64(_mix_int(state + GOLDEN * (round_ + 1))) for round_ in range(ROUNDS))


class Order(Protocol):
    """The order of samples: a `SampleOrder`, or a `BlendOrder` of several datasets."""

    num_samples: int

    def samples_at(self, positions: np.ndarray) -> np.ndarray: ...


class SampleOrder:
    """The endless order of a split's samples for a seed: random access in O(1) memory, the same on every rank."""

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {num_samples}")
        self.seed, self.num_samples = seed, num_samples
        rows = isqrt(num_samples - 1) + 1
        self._halves = (rows, -(-num_samples // rows))

    def sample_at(self, position: int) -> int:
        """The sample at a position."""
        return int(self.samples_at(np.asarray([position], dtype=np.int64))[0])

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Samples, int64, at ``positions`` (integers ≥ 0 of any shape, in any epochs); the result has the same shape."""
        positions = np.asarray(positions)
        flat = positions.reshape(-1).astype(np.int64)
        if flat.size and int(flat.min()) < 0:
            raise ValueError(f"position {flat.min()} is negative")
        epochs, inside = np.divmod(flat, self.num_samples)
        samples = np.empty_like(flat)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._permute(inside[chosen].astype(np.uint64), int(epoch)).astype(np.int64)
        return samples.reshape(positions.shape)

    def _permute(self, points: np.ndarray, epoch: int) -> np.ndarray:
        keys = _round_keys(self.seed, epoch)
        points = self._network(points, keys)
        outside = np.flatnonzero(points >= np.uint64(self.num_samples))
        while outside.size:
            points[outside] = self._network(points[outside], keys)
            outside = outside[points[outside] >= np.uint64(self.num_samples)]
        return points

    def _network(self, points: np.ndarray, keys: tuple[np.uint64, ...]) -> np.ndarray:
        rows, columns = (np.uint64(half) for half in self._halves)
        left, right = np.divmod(points, columns)
        for round_, key in enumerate(keys):
            if round_ % 2 == 0:
                left = (left + _mix(right ^ key) % rows) % rows
            else:
                right = (right + _mix(left ^ key) % columns) % columns
        return left * columns + right


def rank_positions(
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> np.ndarray:
    """Positions, int64 [micro_batches, micro_batch_size], that one replica reads in the step after ``consumed_samples``.

    Micro-batch m of replica r starts at consumed + m·(micro_batch_size·data_parallel_size) + r·micro_batch_size. So all
    replicas together cover [consumed, consumed + global_batch_size) exactly once.

    Raises:
        LimeError: the global batch size is no multiple of micro-batch size times replicas.
    """
    wide = micro_batch_size * data_parallel_size
    if wide < 1 or global_batch_size < 1 or global_batch_size % wide:
        raise LimeError(
            f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size={micro_batch_size} "
            f"times the data-parallel width {data_parallel_size}; change one of them"
        )
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
    starts = consumed_samples + data_parallel_rank * micro_batch_size + wide * np.arange(global_batch_size // wide)
    return starts[:, None] + np.arange(micro_batch_size)
