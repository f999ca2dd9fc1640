"""The doctor's findings, and helpers that its checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lime_dist.config.schema import Config
from lime_dist.doctor.facts import Facts

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line: what was found and, unless it is ok, what to do."""

    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


@dataclass(frozen=True)
class Job:
    """The job to check.

    Attributes:
        slots: number of processes by host, in the order of ranks.
    """

    config: Config
    slots: Mapping[str, int]

    @property
    def world_size(self) -> int:
        return sum(self.slots.values())

    @property
    def hosts(self) -> list[str]:
        """Host of each rank."""
        return [host for host, count in self.slots.items() for _ in range(count)]


Findings = Iterator[Finding]


def groups_of(facts: Sequence[Facts], value: Callable[[Facts], str]) -> dict[str, list[str]]:
    """Hosts by their value."""
    groups: dict[str, list[str]] = {}
    for fact in facts:
        groups.setdefault(value(fact), []).append(fact.host)
    return groups


def listed(hosts: Sequence[str]) -> str:
    """Up to four names, and the number of the others."""
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def differing(groups: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value or 'none'} on {listed(hosts)}" for value, hosts in groups.items())


def everywhere(facts: Sequence[Facts]) -> str:
    return f"on all {len(facts)} hosts" if len(facts) > 1 else f"on {facts[0].host}"


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
