"""Tests of how processes start."""

from __future__ import annotations

from collections.abc import Callable

from support.workers import WorkerGroup


def test_nothing_is_compiled_at_the_start(workers: Callable[[int], WorkerGroup]) -> None:
    """Where there is a compiler, DeepSpeed would spend half a minute on a shared-memory operation that nothing uses."""
    assert workers(1).run("support.cases.compiled_operation") == [None]


def test_partial_sums_of_bf16_products_are_not_rounded(workers: Callable[[int], WorkerGroup]) -> None:
    assert workers(1).run("support.cases.rounds_partial_sums") == [False]
