"""History policies: which entries of the layer history a layer reads. `layout.py` derives everything else from that.

A policy is a class with one method, ``reads``. To add one: write it here, name it in `make_policy`, give its keys and their
defaults to ``HISTORY_KEYS`` in the schema, and add it to ``POLICIES`` in tests/support/policies.py, so that every test of
the policies covers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lime_dist.config.schema import LimeConfig


class Entry(NamedTuple):
    """One entry of the history: the slot S_ℓ that layer ℓ leaves, or one row of U_m, the summary of a chunk of layers.

    Entries compare by the time from which they exist.

    Attributes:
        layer: ℓ; of a summary, the last layer of its chunk.
        row: of the summary.
        span: number of layers that it represents, up to and including ``layer``.
    """

    layer: int
    is_summary: bool = False
    row: int = 0
    span: int = 1

    @property
    def layers(self) -> range:
        """The layers that it represents."""
        return range(self.layer + 1 - self.span, self.layer + 1)


class HistoryPolicy(Protocol):
    """Which entries a layer mixes. Policies are values: equal ones are the same key of caches."""

    def __hash__(self) -> int: ...

    def reads(self, layer: int) -> Sequence[Entry]:
        """The entries that layer ``layer`` mixes: ascending, unique, its own slot (``Entry(layer)``) last."""


@dataclass(frozen=True)
class FullHistory:
    """Every layer reads all earlier layers: the paper's model."""

    def reads(self, layer: int) -> Sequence[Entry]:
        return slots(range(layer + 1))


@dataclass(frozen=True)
class FirstLastHistory:
    """The slots of the first ``first`` layers and of the ``last`` layers before the reader."""

    first: int
    last: int

    def reads(self, layer: int) -> Sequence[Entry]:
        return slots(range(min(self.first, layer)), range(max(0, layer - self.last), layer + 1))


@dataclass(frozen=True)
class ChunkedHistory:
    """``rank`` rows of the summary of every finished chunk of ``chunk_size`` layers, the slots of the reader's own chunk, and
    the slots of the first ``first`` layers."""

    chunk_size: int
    rank: int
    first: int

    def reads(self, layer: int) -> Sequence[Entry]:
        begin = layer - layer % self.chunk_size
        ends = range(self.chunk_size - 1, begin, self.chunk_size)
        summaries = (Entry(end, True, row, self.chunk_size) for end in ends for row in range(self.rank))
        return (*slots(range(min(self.first, begin))), *summaries, *slots(range(begin, layer + 1)))


@dataclass(frozen=True)
class DilatedHistory:
    """Every ``stride``-th slot, the slots of the first ``first`` layers, and of the ``last`` layers before the reader."""

    stride: int
    first: int
    last: int

    def reads(self, layer: int) -> Sequence[Entry]:
        window = range(max(0, layer - self.last), layer + 1)
        return slots(range(0, layer, self.stride), range(min(self.first, layer)), window)


@dataclass(frozen=True)
class StartingLate:
    """A policy from layer ``start_layer`` on; earlier layers read only their own slot."""

    policy: HistoryPolicy
    start_layer: int

    def reads(self, layer: int) -> Sequence[Entry]:
        return self.policy.reads(layer) if layer >= self.start_layer else slots([layer])


def slots(*layers: Iterable[int]) -> tuple[Entry, ...]:
    """The slots of these layers, ascending, each once."""
    return tuple(Entry(layer) for layer in sorted({layer for group in layers for layer in group}))


def make_policy(config: LimeConfig) -> HistoryPolicy:
    """The policy that a configuration names."""
    history = config.history
    keys = history.model_dump(exclude={"policy"}, exclude_none=True)
    policies: dict[str, type[HistoryPolicy]] = {
        "full": FullHistory,
        "first_last": FirstLastHistory,
        "chunked": ChunkedHistory,
        "dilated": DilatedHistory,
    }
    policy = policies[history.policy](**keys)
    return policy if config.start_layer == 1 else StartingLate(policy, config.start_layer)
