"""Two hosts on one machine: network namespaces joined by a link of a given rate and delay. Needs root, `ip` and `tc`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lime_dist.errors import LimeError


class NoNamespaces(LimeError):
    """This machine, or this user, cannot make two hosts."""


@dataclass(frozen=True)
class Hosts:
    """Where two processes run.

    Attributes:
        commands: by host, what comes before a command that is to run there.
        address: of the first host, as the second sees it.
        interface: the network interface between them.
    """

    commands: tuple[list[str], list[str]]
    address: str
    interface: str


LOOPBACK = Hosts(([], []), "127.0.0.1", "lo")


@contextmanager
def slow_link(rate: str, delay: str) -> Iterator[Hosts]:
    """Two namespaces, removed again whatever happens; ``rate`` and ``delay`` as `tc` takes them (200mbit, 0ms), each way.

    Raises:
        NoNamespaces: the rights or the tools are missing.
        LimeError: a rate or a delay that `tc` does not take.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise NoNamespaces("a slow link needs the commands ip and tc (Debian: apt-get install iproute2)")
    names = [f"lime-{os.getpid()}-{host}" for host in "ab"]
    inside = [["ip", "netns", "exec", name] for name in names]
    try:
        for name in names:
            _run(["ip", "netns", "add", name])
        peer = ["peer", "name", "eth0", "netns", names[1]]
        _run(["ip", "link", "add", "eth0", "netns", names[0], "type", "veth", *peer])
        for index, prefix in enumerate(inside):
            _run([*prefix, "ip", "addr", "add", f"10.99.0.{index + 1}/24", "dev", "eth0"])
            for device in ("lo", "eth0"):
                _run([*prefix, "ip", "link", "set", device, "up"])
            shape = [*prefix, "tc", "qdisc", "add", "dev", "eth0"]
            _run([*shape, "root", "handle", "1:", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])
            if delay.strip("0.mus"):
                _run([*shape, "parent", "1:", "netem", "delay", delay])
        yield Hosts((inside[0], inside[1]), "10.99.0.1", "eth0")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        line = f"{' '.join(command)}: {reason}"
        if "tc" in command:
            raise LimeError(f"the slow link cannot be shaped so: {line}")
        raise NoNamespaces(f"a slow link needs root and network namespaces: {line}")
