"""Locks a run folder on rank 0, so that only one run writes into it at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lime_dist.data.files import lock_folder
from lime_dist.errors import LimeError
from lime_dist.launchers import is_main_process

TIMEOUT = 60.0
"""Seconds to wait for another run that writes into the same folder."""


def wait_for_predecessor(directory: Path) -> None:
    """On rank 0, wait for the processes of an earlier start to end.

    They save and stop when their launcher is gone, and until then they hold its port.

    Raises:
        LimeError: they have not ended after `TIMEOUT`.
    """
    if not is_main_process() or not (directory / ".lock").exists():
        return
    try:
        with lock_folder(directory):
            return
    except LimeError:
        print(f"another run is still writing into {directory}; waiting for it to end", flush=True)
    with lock_folder(directory, TIMEOUT):
        pass


def hold_directory(directory: Path, held: contextlib.ExitStack) -> None:
    """On rank 0, create the run folder and lock it until ``held`` closes.

    Raises:
        LimeError: it cannot be written, or another run holds it.
    """
    if not is_main_process():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LimeError(f"run.directory={directory}: {error.strerror}; give a folder that can be written") from None
    held.enter_context(lock_folder(directory, TIMEOUT))
