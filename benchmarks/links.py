"""Several hosts on one machine: namespaces joined by links of a given rate and delay. Needs root, util-linux and iproute2.

A host has its own network, host name, process numbers and mounts. They live as long as one process, the host's init.
The kernel ends it when the process that made the host ends, for whatever reason, so nothing is left over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from lime_dist.errors import LimeError

NETWORK = "10.99.0"
INTERFACE = "eth0"
PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
"""The programs in use, and their Debian packages."""
LIFELINE = ["setpriv", "--pdeathsig", "KILL"]
"""Words before a command, so that the kernel ends it with the process that started it."""

INIT = """
hostname "$1" && ip link set lo up && mount -t tmpfs none /run && mkdir /run/sshd || exit 1
printf '127.0.0.1 localhost\n%s\n' "$2" >/run/hosts && mount --bind /run/hosts /etc/hosts || exit 1
printf '%s: files\n' passwd group shadow hosts services protocols >/run/nsswitch.conf
if [ -e /etc/nsswitch.conf ]; then mount --bind /run/nsswitch.conf /etc/nsswitch.conf || exit 1; fi
echo ready
exec >/dev/null 2>&1
while :; do sleep infinity & wait; done
"""
"""A host's first process: makes room for a host file and an sshd of its own, then adopts orphans. (Names are resolved from files only:
a query to an unreachable name server takes a quarter of a minute to fail.)"""


class NoNamespaces(LimeError):
    """Hosts cannot be made on this machine or by this user."""


@dataclass(frozen=True)
class Host:
    """One of several machines.

    Attributes:
        init: process number of its first process, as seen by its maker.
    """

    name: str
    address: str
    init: int

    def command(self, *words: str, directory: str | None = None) -> list[str]:
        """Return a command line that runs ``words`` on this host, in a directory of the host (default: the current one)."""
        namespaces = ["--net", "--uts", "--mount", "--pid", f"--wdns={directory or os.getcwd()}"]
        return ["nsenter", "--target", str(self.init), *namespaces, *words]

    def network_command(self, *words: str) -> list[str]:
        """Return a command line that runs ``words`` in the host's network only, with the files and process numbers of its maker."""
        return ["nsenter", "--target", str(self.init), "--net", *words]

    def run(self, *words: str) -> str:
        """Run a short command on this host and return its output.

        Raises:
            LimeError: the command fails; the message has the end of its output.
        """
        return _run(self.command(*words))


@contextmanager
def hosts(names: Sequence[str], rate: str | None = None, delay: float = 0.0) -> Iterator[list[Host]]:
    """Make hosts on one network that know each other by name. At the end of the block they and their processes are gone.

    Args:
        rate: rate of what leaves a host, in the form of `tc` (200mbit); None for no limit.
        delay: seconds from a host to any other host.

    Raises:
        NoNamespaces: rights or tools are missing.
        LimeError: `tc` rejects the rate.
    """
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise NoNamespaces(f"hosts on one machine need the command {program} (Debian: apt-get install {package})")
    addresses = [f"{NETWORK}.{number + 1}" for number in range(len(names))]
    table = "\n".join(f"{address} {name}" for address, name in zip(addresses, names, strict=True))
    with ExitStack() as stack:
        switch = stack.enter_context(_host("switch", "", table))
        switch.run("ip", "link", "add", "name", "switch", "up", "type", "bridge")
        made = []
        for name, address in zip(names, addresses, strict=True):
            host = stack.enter_context(_host(name, address, table))
            made.append(host)
            stack.enter_context(_cable(host, switch, delay))
            switch.run("ip", "link", "set", "dev", name, "up", "master", "switch")
            host.run("ip", "addr", "add", f"{address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", "dev", INTERFACE, "up")
            if rate is not None:
                shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                host.run("tc", "qdisc", "add", "dev", INTERFACE, *shape)
        yield made


@contextmanager
def _host(name: str, address: str, table: str) -> Iterator[Host]:
    separate = ["unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
    with _helper([*separate, "sh", "-c", INIT, "init", name, table]) as number:
        (init,) = psutil.Process(number).children()
        yield Host(name, address, init.pid)


@contextmanager
def _cable(host: Host, switch: Host, delay: float) -> Iterator[None]:
    """Make a link from ``INTERFACE`` on the host to a device with the host's name on the switch."""
    if not delay:
        end = ["peer", "name", INTERFACE, "netns", str(host.init)]
        _run(switch.network_command("ip", "link", "add", "name", host.name, "type", "veth", *end))
        yield
        return
    line = [sys.executable, str(Path(__file__).with_name("delay_line.py")), str(delay), INTERFACE, host.name]
    with _helper(switch.network_command(*line)):
        _run(switch.network_command("ip", "link", "set", "dev", INTERFACE, "netns", str(host.init)))
        yield


@contextmanager
def _helper(command: list[str]) -> Iterator[int]:
    """Start a process and wait until it is ready; yield its process number, and end it after the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*LIFELINE, *command], text=True, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != "ready\n":
                process.wait()
                raise NoNamespaces(f"hosts on one machine need root and namespaces: {_last(process.stderr.read())}")
            yield process.pid
        finally:
            process.kill()


@dataclass(frozen=True)
class Hosts:
    """Where the processes of a job run.

    Attributes:
        commands: for each host, the words before a command that runs there.
        address: address of the first host, as seen by the others.
        interface: network interface between them.
    """

    commands: tuple[list[str], ...]
    address: str
    interface: str


LOOPBACK = Hosts(([], []), "127.0.0.1", "lo")


@contextmanager
def slow_link(rate: str, delay: float, count: int = 2) -> Iterator[Hosts]:
    """Make ``count`` hosts; other arguments and errors as for `hosts`."""
    with hosts([f"host{number}" for number in range(count)], rate, delay) as made:
        yield Hosts(tuple(host.command() for host in made), made[0].address, INTERFACE)


def _run(command: list[str]) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        line = f"{' '.join(command)}: {_last(finished.stderr)}"
        if "tc" in command:
            raise LimeError(f"the link cannot get this rate and delay: {line}")
        raise NoNamespaces(f"hosts on one machine need root and namespaces: {line}")
    return finished.stdout


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
