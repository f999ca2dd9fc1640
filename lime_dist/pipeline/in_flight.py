"""How many micro-batches a stage holds at a time, and how many payloads it receives ahead."""

from __future__ import annotations

AHEAD = 1
"""Receives that are posted beyond the one that is waited for (`transfer.py`)."""


def warm_up_micro_batches(micro_batches: int, stages: int, stage: int, extra: int) -> int:
    """Forward passes of a stage before its first backward pass, less one."""
    return min(micro_batches - 1, (stages - 1 - stage) * (1 + extra))


def micro_batches_in_flight(micro_batches: int, stages: int, stage: int, extra: int) -> int:
    """The most micro-batches whose activations a stage holds at a time."""
    return warm_up_micro_batches(micro_batches, stages, stage, extra) + 1
