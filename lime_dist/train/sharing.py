"""Which replica updates which parameter of a stage: ZeRO-1's shares, whole parameters each."""

from __future__ import annotations

from collections.abc import Mapping, Set


def assign_owners(sizes: Mapping[str, int], replicas: int, tied: Set[str]) -> dict[str, int]:
    """By exported name: the owner. The largest go first, to the least loaded.

    Tied ones belong to owner 0 on every stage: the owners of all copies must be ranks of one replica.

    Args:
        sizes: elements of each parameter.
    """
    load = [0] * replicas
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (name not in tied, -sizes[name], name)):
        owner = 0 if name in tied else load.index(min(load))
        owners[name] = owner
        load[owner] += sizes[name]
    return owners
