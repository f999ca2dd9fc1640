"""Which rank holds which stage of which replica, and on which host it runs."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import psutil
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import ProcessTopology

from lime_dist.errors import first_line

AXES = {"stages_together": ["data", "pipe"], "replicas_together": ["pipe", "data"]}
"""Axes of the process grid by ``parallel.topology``. Consecutive ranks are neighbours along the last axis. Launchers give the
processes of a host consecutive ranks, so neighbours along it share a host if possible."""

_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\](?::\d+)?")

EXIT_SECONDS = 2.0
"""Time in which a killed process ends, after its connections have broken."""

MOST_NAMED = 8
"""At most this many replicas or hosts are named in a line."""


def process_grid(stages: int, width: int, topology: str) -> ProcessTopology:
    """The grid of ranks by stage and replica, as DeepSpeed's topology."""
    sizes = {"pipe": stages, "data": width}
    axes = AXES[topology]
    return ProcessTopology(axes=axes, dims=[sizes[axis] for axis in axes])


@dataclass(frozen=True)
class Placement:
    """The hosts on which the processes of a job run.

    Attributes:
        hosts: name of the host, by rank.
        addresses: name of the host, by network address.
        processes: process ID on its host, by rank.
    """

    hosts: Sequence[str]
    addresses: dict[str, str]
    processes: Sequence[int] = ()

    @property
    def several(self) -> bool:
        """Whether there is more than one host."""
        return len(set(self.hosts)) > 1

    def name(self, rank: int) -> str:
        """The rank, with its host if there are several."""
        return f"rank {rank} on {self.hosts[rank]}" if self.several else f"rank {rank}"

    def company(self, ranks: Iterable[int], own: int) -> str:
        """The hosts of ``ranks`` other than rank ``own``'s, as the end of a phrase, such as ", with b, c". Empty if there are none."""
        others = list(dict.fromkeys(self.hosts[rank] for rank in ranks if self.hosts[rank] != self.hosts[own]))
        return f", with {_shortened(others, 'hosts')}" if others else ""

    def lost(self, error: str, ranks: Iterable[int] | None, own: int) -> str:
        """Who is gone: the ranks of this host that have ended, else who is at the address in an operation's error.

        Args:
            error: of a library, whose first line names an address.
            ranks: that took part in the operation; None or empty: all.
        """
        if ended := self._ended(own):
            verb, whose = ("is", "its") if len(ended) == 1 else ("are", "their")
            return f"{_shortened([self.name(rank) for rank in ended], 'ranks')} {verb} gone: killed, or ended by an error of {whose} own"
        line = first_line(error)
        address = next(iter(_ADDRESS.findall(line)), "").removeprefix("::ffff:")
        others = [rank for rank in (list(ranks or ()) or range(len(self.hosts))) if rank != own]
        there = [rank for rank in others if self.hosts[rank] == self.addresses.get(address)]
        named = _shortened([self.name(rank) for rank in there or others], "ranks")
        return f"the connection to {named} broke: the other end is gone, or cannot be reached ({_reason(self.explain(line))})"

    def _ended(self, own: int) -> list[int]:
        """The ranks of this host whose processes have ended. A connection breaks a little earlier, so wait for one to end."""
        here = [rank for rank in range(len(self.processes)) if rank != own and self.hosts[rank] == self.hosts[own]]
        until = time.monotonic() + EXIT_SECONDS
        while here:
            if (ended := [rank for rank in here if not _is_alive(self.processes[rank])]) or time.monotonic() > until:
                return ended
            time.sleep(0.05)
        return []

    def explain(self, line: str) -> str:
        """Add the host's name after each ``[address]`` in a line that a library has printed."""

        def named(address: re.Match[str]) -> str:
            host = self.addresses.get(address[1].removeprefix("::ffff:"))
            return address[0] if host is None or not self.several else f"{address[0]} ({host})"

        return _ADDRESS.sub(named, line)


def gather_placement() -> Placement:
    """Gather the hosts of all ranks. All ranks must call it."""
    addresses = [
        address.address
        for name, listed in psutil.net_if_addrs().items()
        for address in listed
        if name != "lo" and address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    everyone: list[tuple[str, list[str], int]] = [("", [], 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), addresses, os.getpid()))
    return Placement(
        hosts=[host for host, *_ in everyone],
        addresses={address.partition("%")[0]: host for host, listed, _ in everyone for address in listed},
        processes=[process for *_, process in everyone],
    )


def _reason(line: str) -> str:
    """A library's line without its source file and its advice."""
    return re.sub(r"^(\[[^]]*[/:][^]]*\]\s*)+|\. .*", "", line)


def _is_alive(process: int) -> bool:
    """Whether a process of this host still runs; one that has ended and is not yet reaped does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def crossings(grid: ProcessTopology, hosts: Sequence[str]) -> int:
    """Number of boundaries, over all replicas, whose two stages are on different hosts."""
    return sum(hosts[a] != hosts[b] for ranks in grid.get_axis_comm_lists("pipe") for a, b in pairwise(ranks))


def describe_placement(grid: ProcessTopology, hosts: Sequence[str]) -> str:
    """One line with the hosts of every replica's stages and the number of boundaries between hosts."""
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
