"""Slurm (Debian's packages) on the test bed: a controller on the first host; every host is a node."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.bed import Bed, NoNamespaces

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
CONFIG = """
ClusterName=bed
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_min_interval=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
MUNGE = (
    "mkdir -p /run/munge && exec munged --force --key-file={folder}/munge.key --socket=/run/munge/munge.socket.2 "
    "--pid-file=/run/munge/pid --log-file=/run/munge/log --seed-file=/run/munge/seed"
)


@dataclass(frozen=True)
class Slurm:
    """A running Slurm, which ends with the bed."""

    bed: Bed
    folder: Path

    def run(self, *words: str, host: int = 0, **more: str) -> str:
        """Run a command, which must succeed; returns its output."""
        with self.bed.start(*words, host=host, SLURM_CONF=str(self.folder / "slurm.conf"), **more) as process:
            said: str = process.communicate(timeout=30)[0]
        assert process.returncode == 0, f"{' '.join(words)}: {said}"
        return said

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)


def start(bed: Bed, folder: Path) -> Slurm:
    """Start Slurm on a bed.

    Raises:
        NoNamespaces: its programs are missing.
    """
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise NoNamespaces(f"Slurm on one machine needs {program} (Debian: apt-get install {package})")
    nodes = "".join(f"NodeName={host.name} NodeAddr={host.address} CPUs={os.cpu_count()}\n" for host in bed.hosts)
    (folder / "slurm.conf").write_text(CONFIG.format(first=bed.hosts[0], folder=folder) + nodes)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    slurm = Slurm(bed, folder)
    for number, host in enumerate(bed.hosts):
        (folder / host.name).mkdir()
        slurm.run("sh", "-c", MUNGE.format(folder=folder), host=number)
    slurm.run("slurmctld", "-i")
    for number in range(len(bed.hosts)):
        slurm.run("slurmd", host=number)
    begin = time.monotonic()
    while slurm.run("sinfo", "--noheader", "--Node", "--format=%t").split() != ["idle"] * len(bed.hosts):
        assert time.monotonic() - begin < 20, (folder / "slurmctld.log").read_text()
        time.sleep(0.2)
    return slurm
