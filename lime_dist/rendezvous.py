"""Checks, before torch connects the processes of a job, that they can be connected: its own errors are tracebacks."""

from __future__ import annotations

import os
import socket
import time

from lime_dist.errors import LimeError
from lime_dist.hostfile import port_problem


def check_rendezvous(patience: float) -> None:
    """On rank 0, check that MASTER_PORT is free; on the others, wait until rank 0 listens at MASTER_ADDR.

    torchrun listens itself, on a port of its own choice, so nothing is checked under it.

    Args:
        patience: seconds to wait for rank 0.

    Raises:
        LimeError: the port is in use, or the first host cannot be reached.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    address, given = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not address or not given.isdecimal() or not 0 < int(given) < 65536:
        raise LimeError(
            f"RANK is set, but MASTER_ADDR={address or ''} and MASTER_PORT={given} are not the address and the port of the first "
            "process; set them, or start with deepspeed or torchrun"
        )
    port = int(given)
    if environment["RANK"] == "0":
        if (problem := port_problem(port)) is not None:
            raise LimeError(problem)
    else:
        _wait_for(address, port, patience)


def _wait_for(address: str, port: int, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((address, port), timeout=5.0):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise LimeError(
                    f"{socket.gethostname()} does not reach the first process of the job at {address}:{port} "
                    f"({error.strerror or error}); set MASTER_ADDR to an address of the first host that all hosts reach, and open "
                    "the port; python -m lime_dist.doctor checks the hosts"
                ) from None
        time.sleep(0.2)
