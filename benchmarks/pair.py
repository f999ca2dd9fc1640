"""Run the processes of one job, one per host, that measure something and return their results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from links import Hosts

ON_CPUS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_pair(
    hosts: Hosts, worker: str, settings: dict[str, Any], variables: Mapping[str, str] = ON_CPUS
) -> list[dict[str, Any]]:
    """Run ``worker`` (a script beside this one) once per host, with ``settings`` as JSON and a folder as its arguments; return what
    each rank wrote into ``<rank>.json`` there.

    Args:
        variables: of the environment of all.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    size = str(len(hosts.commands))
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, prefix in enumerate(hosts.commands):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": hosts.address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": hosts.interface,
                **variables,
            }  # fmt: skip
            script = Path(__file__).with_name(worker)
            command = [*prefix, sys.executable, str(script), json.dumps(settings), folder]
            processes.append(subprocess.Popen(command, env=environment))
        try:
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(statuses):
            raise RuntimeError(f"the processes of {worker} ended with {statuses}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(len(processes))]
