"""Protects how processes start."""

from __future__ import annotations

from collections.abc import Callable

from support.workers import WorkerGroup


def test_nothing_is_compiled_at_the_start(workers: Callable[[int], WorkerGroup]) -> None:
    """DeepSpeed would compile an operation for shared memory on CPUs, where there is a compiler; half a minute, for nothing."""
    assert workers(1).run("support.cases.compiled_operation") == [None]
