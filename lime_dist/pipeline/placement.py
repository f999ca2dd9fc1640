"""Which process holds which stage of which replica, and on which host it runs."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import psutil
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import ProcessTopology

AXES = {"stages_together": ["data", "pipe"], "replicas_together": ["pipe", "data"]}
"""By ``parallel.topology``: the axes of the grid of processes, the one along which ranks are neighbours last. Launchers
number the processes of a host consecutively, so neighbours are on one host where they can be."""

MOST_NAMED = 8
"""Replicas or hosts that a line names one by one."""


def process_grid(stages: int, width: int, topology: str) -> ProcessTopology:
    """Ranks by stage and replica, as DeepSpeed takes it."""
    sizes = {"pipe": stages, "data": width}
    axes = AXES[topology]
    return ProcessTopology(axes=axes, dims=[sizes[axis] for axis in axes])


@dataclass(frozen=True)
class Placement:
    """Where the processes of the job run.

    Attributes:
        hosts: by rank, the name of its host.
        addresses: by network address, the name of the host that has it.
    """

    hosts: Sequence[str]
    addresses: dict[str, str]

    @property
    def several(self) -> bool:
        return len(set(self.hosts)) > 1

    def name(self, rank: int) -> str:
        """A rank, with its host where there are several."""
        return f"rank {rank} on {self.hosts[rank]}" if self.several else f"rank {rank}"

    def company(self, ranks: Iterable[int], own: int) -> str:
        """The other hosts that a rank needs for what it does with ``ranks``, as the end of a phrase; empty if there are none."""
        others = list(dict.fromkeys(self.hosts[rank] for rank in ranks if self.hosts[rank] != self.hosts[own]))
        return f", with {_shortened(others, 'hosts')}" if others else ""

    def explain(self, line: str) -> str:
        """A library's line with the host's name behind each ``[address]``."""

        def named(found: re.Match[str]) -> str:
            host = self.addresses.get(found[1].removeprefix("::ffff:"))
            return found[0] if host is None or not self.several else f"{found[0]} ({host})"

        return re.sub(r"\[([0-9a-fA-F.:]+)\](?::\d+)?", named, line)


def gather_placement() -> Placement:
    """Ask all ranks where they are; called by all ranks together."""
    addresses = [
        address.address
        for name, found in psutil.net_if_addrs().items()
        for address in found
        if name != "lo" and address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    everyone: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), addresses))
    return Placement(
        hosts=[host for host, _ in everyone],
        addresses={address.partition("%")[0]: host for host, listed in everyone for address in listed},
    )


def crossings(grid: ProcessTopology, hosts: Sequence[str]) -> int:
    """Boundaries of all replicas that lie between two hosts."""
    return sum(hosts[a] != hosts[b] for ranks in grid.get_axis_comm_lists("pipe") for a, b in pairwise(ranks))


def describe_placement(grid: ProcessTopology, hosts: Sequence[str]) -> str:
    """One line: the hosts of every replica's stages, and how many boundaries lie between two hosts."""
    replicas = grid.get_axis_comm_lists("pipe")
    parts = []
    for replica, ranks in enumerate(replicas):
        where, first = [], 0
        for host, run in groupby(hosts[rank] for rank in ranks):
            last = first + len(list(run)) - 1
            where.append(f"{first if first == last else f'{first}-{last}'} on {host}")
            first = last + 1
        label = f"replica {replica}: " if len(replicas) > 1 else ""
        parts.append(f"{label}stage{'s' if len(ranks) > 1 else ''} {', '.join(where)}")
    boundaries = len(replicas) * (len(replicas[0]) - 1)
    return f"{_shortened(parts, 'replicas', '; ')}; {crossings(grid, hosts)} of {boundaries} boundaries between hosts"


def _shortened(words: Sequence[str], kind: str, separator: str = ", ") -> str:
    rest = len(words) - MOST_NAMED
    return separator.join(words[:MOST_NAMED]) + (f" and {rest} more {kind}" if rest > 0 else "")
