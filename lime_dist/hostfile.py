"""The launcher's hostfile, lines ``HOST slots=N``, the port of the first host, and words for a shell on these hosts.

`lime_dist.doctor` imports this file. `launch/multinode.sh` runs it with any Python, before anything is installed:

    python3 -I lime_dist/hostfile.py read HOSTFILE      a line "HOST N" for each host
    python3 -I lime_dist/hostfile.py here HOST          exit status 0 if the host is this machine, else 1
    python3 -I lime_dist/hostfile.py port PORT          exit status 3, with a line on stderr, if a job cannot use this port here
    python3 -I lime_dist/hostfile.py quote WORD ...     each word as `quote` returns it, on a line of its own
"""

from __future__ import annotations

import errno
import re
import shlex
import socket
import sys
from pathlib import Path

HOST = re.compile(r"[A-Za-z0-9_.:@-]+")
"""Names of hosts. ssh and pdsh give other characters a meaning, such as several hosts in ``node[1-4]``."""

PORT_IN_USE = 3
"""Exit status of the command ``port``."""


class HostfileError(ValueError):
    """A mistake in a hostfile; the message names the file and, if it is in one, the line."""


def parse_hostfile(path: Path) -> dict[str, int]:
    """Number of processes by host, in the order of the file. ``#`` begins a comment; lines may be blank or end with CRLF.

    Raises:
        OSError: the file cannot be read.
        HostfileError: a line is wrong, a host is listed twice, or there is none.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None
        if match is None or not HOST.fullmatch(words[0]):
            raise HostfileError(f"{path}, line {number}: {line.strip()!r} is not 'HOST slots=N'")
        if words[0] in slots:
            raise HostfileError(f"{path}, line {number}: {words[0]} is listed twice")
        slots[words[0]] = int(match[1])
    if not slots:
        raise HostfileError(f"{path} lists no host")
    return slots


def is_here(host: str) -> bool:
    """Whether a host is this machine: one of the addresses of its name belongs to it."""
    try:
        addresses = {(kind, address) for kind, *_, address in socket.getaddrinfo(host.rpartition("@")[2], 0)}
    except OSError:
        return False
    for kind, address in addresses:
        try:  # the kernel may lack the kind, as where IPv6 is off
            with socket.socket(kind) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def port_problem(port: int) -> str | None:
    """Why the first process of a job cannot listen on a port of this machine, and what to do; None: it can."""
    try:
        probe = socket.socket(socket.AF_INET6)
    except OSError:  # IPv6 is off
        probe = socket.socket(socket.AF_INET)
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        try:
            probe.bind(("", port))
            probe.listen()
        except OverflowError:
            return f"{port} is not a port; give 1 to 65535"
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return (
                    f"port {port} of {socket.gethostname()} cannot be used ({error.strerror}), perhaps because of another run; "
                    "choose another: MASTER_PORT for the scripts in launch/, --master_port for deepspeed"
                )
    return None


def quote(word: str) -> str:
    """A word that arrives unchanged at a process that ``deepspeed`` starts with pdsh on another host.

    ``deepspeed`` puts words with a space between double quotes, with a backslash before each double quote in them, and leaves
    others as they are. pdsh then replaces ``%h``, ``%n``, ``%u`` and ``%%``, and a shell on the host reads the rest.
    """
    if " " in word:
        quoted = re.sub(r"([\\$`])", r"\\\1", word)
    else:
        quoted = shlex.quote(word)
    return quoted.replace("%", "%%")


def main(command: str, *words: str) -> int:
    """Run one of the commands above; returns its exit status."""
    if command == "read":
        path = Path(words[0])
        try:
            slots = parse_hostfile(path)
        except OSError as error:
            print(f"error: cannot read the hostfile {path}: {error.strerror}", file=sys.stderr)
            return 2
        except HostfileError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print("\n".join(f"{host} {count}" for host, count in slots.items()))
    elif command == "here":
        return 0 if is_here(words[0]) else 1
    elif command == "port":
        if (problem := port_problem(int(words[0]))) is not None:
            print(problem, file=sys.stderr)
            return PORT_IN_USE
    else:
        print("\n".join(map(quote, words)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
