"""Helpers for the data commands: help texts, progress bars, and worker processes that never outlive their parent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lime_dist.commands import CommandParser
from lime_dist.errors import LimeError


def command_parser(name: str, description: str, example: str) -> CommandParser:
    """Return a parser whose --help ends with an example."""
    return CommandParser(
        prog=f"python -m data_tools.{name}",
        description=description,
        epilog=f"example:\n  {example}",
    )


def progress_bar(total: int, description: str, **options: Any) -> tqdm[Any]:
    """Return a progress bar on stderr, in bytes unless ``options`` say otherwise. In a log file it writes at most one line every 10 s."""
    defaults = {"unit": "B", "unit_scale": True, "mininterval": 0.2 if os.isatty(2) else 10.0, "dynamic_ncols": True}
    return tqdm(total=total, desc=description, **(defaults | options))


@contextmanager
def disk_errors(what_to_do: str) -> Iterator[None]:
    """Turn an OSError (disk full, not writable) into a LimeError that ends with ``what_to_do``."""
    try:
        yield
    except OSError as error:
        raise LimeError(f"{error.filename or 'disk'}: {error.strerror or error}; {what_to_do}") from None


def start_worker(parent: int) -> None:
    """Initialise a worker process: it dies silently on Ctrl-C, and within 0.25 s of the parent's death.

    Without this, the workers of a ProcessPoolExecutor whose parent was killed wait forever: each holds both ends of the queue.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
