"""A cluster on one machine: hosts from `benchmarks/links.py`, each with its own sshd, for the real launcher.

    python tests/cluster/bed.py [--hosts 2] [--slots 1] [--rate 200mbit] [--delay 0.02] [COMMAND ...]

runs COMMAND (by default a shell) on the first host. There, ``ssh host-b`` works, ``$HOSTFILE`` is the path of a hostfile, and
``deepspeed --hostfile $HOSTFILE pretrain.py …`` trains on all hosts. Keys are in a temporary folder; ~/.ssh is neither read nor
written. Needs root, and on Debian the packages openssh-server, openssh-client, pdsh, iproute2, util-linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from links import Host, NoNamespaces, hosts  # noqa: E402  # benchmarks/ is on the path only now

SSHD = "/usr/sbin/sshd"
PROGRAMS = {SSHD: "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
SSHD_CONFIG = """
HostKey {key}
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH_CONFIG = """
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
LogLevel ERROR
"""


@dataclass(frozen=True)
class Bed:
    """Hosts with an sshd on each.

    Attributes:
        folder: keys, hostfile, and in ``bin`` an `ssh` that uses them.
        slots: processes per host, as in the hostfile.
    """

    hosts: list[Host]
    folder: Path
    slots: int

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a login on a host: no variables of a launcher, and its own home."""
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {key: value for key, value in os.environ.items() if key not in launched}
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{kept.get('PATH', '')}"
        return {**kept, "PATH": path, "HOME": str(self.folder), "HOSTFILE": str(self.hostfile), **more}

    def start(self, *words: str, host: int = 0, directory: str | None = None, **more: str) -> subprocess.Popen[str]:
        """Start a command on a host, with stdout and stderr in one pipe; further arguments are environment variables."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        command = self.hosts[host].command(*words, directory=directory)
        return subprocess.Popen(command, env=self.environment(**more), text=True, **pipes)

    def processes(self, host: int) -> dict[int, str]:
        """The live processes of a host except its init and sshd: process id (as seen here) and command line."""
        init = self.hosts[host].init
        processes = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                same = os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has just ended
                continue
            if (
                same
                and line
                and int(folder.name) != init
                and line != "sleep infinity"
                and not line.startswith("sshd: ")
            ):
                processes[int(folder.name)] = line
        return {number: line for number, line in processes.items() if not line.startswith(SSHD)}

    def kill_everything(self, host: int) -> None:
        """Kill all processes of a host except its init and sshd."""
        for number in self.processes(host):
            os.kill(number, signal.SIGKILL)

    def set_link(self, host: int, state: str) -> None:
        """Take a host's link ``down`` or ``up``. (``up`` restores its address and routes.)"""
        self.hosts[host].run("ip", "link", "set", "dev", "eth0", state)


@contextmanager
def bed(folder: Path, count: int = 2, slots: int = 1, rate: str | None = None, delay: float = 0.0) -> Iterator[Bed]:
    """Hosts host-a, host-b, … They end, with everything that runs on them, when the block or this process ends in any way.

    Raises:
        NoNamespaces: rights or programs are missing.
    """
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise NoNamespaces(f"a cluster on one machine needs {program} (Debian: apt-get install {package})")
    names = [f"host-{letter}" for letter in string.ascii_lowercase[:count]]
    with hosts(names, rate, delay) as made:
        _make_keys(folder, names)
        (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in names))
        for host in made:
            # sshd refuses a locked account, which root's often is; unlock it on this host.
            host.run(
                "sh",
                "-c",
                "sed 's/^root:[^:]*:/root:*:/' /etc/shadow >/run/shadow && mount --bind /run/shadow /etc/shadow",
            )
            host.run(SSHD, "-f", str(folder / f"{host.name}.sshd"))
        cluster = Bed(made, folder, slots)
        for host in made:
            _await_ssh(cluster, host.name)
        yield cluster


def _make_keys(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = []
    for name in ("user", *names):
        key = folder / name
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        if name != "user":
            known.append(f"{name} {key.with_suffix('.pub').read_text()}")
            (folder / f"{name}.sshd").write_text(SSHD_CONFIG.format(key=key, folder=folder))
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    wrapper = folder / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def _await_ssh(cluster: Bed, name: str, patience: float = 10.0) -> None:
    begin = time.monotonic()
    while True:
        with cluster.start("ssh", name, "true") as process:
            said = process.communicate()[0].strip()
        if process.returncode == 0:
            return
        if time.monotonic() - begin > patience:
            raise NoNamespaces(f"ssh to {name} does not work on this machine: {said}")
        time.sleep(0.1)


def main() -> None:
    from lime_dist.errors import run_command

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts, at most 26")
    parser.add_argument("--slots", type=int, default=1, help="processes per host, as in the hostfile")
    parser.add_argument("--rate", help="rate of each link, in the form of tc")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds from one host to another")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run on host-a; by default a shell")
    given = parser.parse_args()

    def run() -> None:
        with (
            tempfile.TemporaryDirectory(prefix="lime-bed-") as folder,
            bed(Path(folder), given.hosts, given.slots, given.rate, given.delay) as cluster,
        ):
            words = given.command or [os.environ.get("SHELL", "/bin/sh")]
            status = subprocess.call(cluster.hosts[0].command(*words), env=cluster.environment())
        raise SystemExit(status)

    run_command(run)


if __name__ == "__main__":
    main()
