"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.workers import WorkerGroup


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerGroup]]:
    """``workers(n)``: the session's group of n processes, started when first asked for, again if a case killed it."""
    groups: dict[int, WorkerGroup] = {}

    def get(size: int) -> WorkerGroup:
        if size not in groups or not groups[size].alive:
            groups[size] = WorkerGroup(size)
        return groups[size]

    yield get
    for group in groups.values():
        group.close()
