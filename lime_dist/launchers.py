"""The launchers that started this process: which rank they gave it, who they are, and whether they dropped a choice of GPUs."""

from __future__ import annotations

import os
from pathlib import Path

from lime_dist.errors import LimeError

LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
"""The command line of a launcher contains one of these."""

DEVICES = "CUDA_VISIBLE_DEVICES"


def world_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on rank 0, before and after the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def launcher_links() -> list[tuple[int, int]]:
    """(process, parent) for each link from this process up to the first of its launchers."""
    links, process = [], os.getpid()
    while (parent := parent_of(process)) is not None and _is_launcher(parent):
        links.append((process, parent))
        process = parent
    return links


def parent_of(process: int) -> int | None:
    """The parent of a process; None: the process is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def check_devices() -> None:
    """Refuse to run on GPUs that the user has excluded.

    ``deepspeed`` with ``--num_gpus`` or ``--include`` ignores CUDA_VISIBLE_DEVICES, and begins with the first GPU of the
    machine, which may be somebody else's.

    Raises:
        LimeError: this process is to use other GPUs than the ones that CUDA_VISIBLE_DEVICES named when its launcher started.
    """
    # `deepspeed` removes the variable for its children, so the one that the user has set is in the first launcher that has it.
    given = next(filter(None, (_variables(parent).get(DEVICES) for _, parent in launcher_links())), "")
    used = os.environ.get(DEVICES, "")
    if given and not {*used.split(",")} <= {*given.split(",")}:
        raise LimeError(
            f"{DEVICES}={given} was given, but the launcher starts processes on {used}: deepspeed ignores the variable if "
            "--num_gpus or --include is given; leave these out, or use launch/local.sh"
        )


def _variables(process: int) -> dict[str, str]:
    """The environment with which a process was started; {} if it cannot be read."""
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return {name: value for name, separator, value in (entry.partition("=") for entry in entries) if separator}


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in LAUNCHERS)
