"""Which replica updates which parameters of a stage under ZeRO 1: each owns whole parameters."""

from __future__ import annotations

from collections.abc import Mapping, Set


def assign_owners(sizes: Mapping[str, int], replicas: int, tied: Set[str]) -> dict[str, int]:
    """The owner of each parameter, by exported name. The largest parameters are assigned first, each to the least loaded replica.

    Tied parameters belong to replica 0 on every stage: the owners of all copies of a weight must lie in one replica.

    Args:
        sizes: number of elements of each parameter.
        tied: names of the parameters that another stage holds as well.
    """
    load = [0] * replicas
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (name not in tied, -sizes[name], name)):
        owner = 0 if name in tied else load.index(min(load))
        owners[name] = owner
        load[owner] += sizes[name]
    return owners
