"""The exception for users' mistakes, and the function that turns it into one line and exit status 2."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 5.0
"""Time that another process has to print the same error first."""


class LimeError(Exception):
    """A user's mistake. Its message is one line: what was given, where, and what to do instead."""


class PeerLost(Exception):
    """Another process of the job is gone. The one-line message says who waited for whom, and in which operation."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error, or of its message; the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(main: Callable[[], None], speaks: bool = True) -> None:
    """Run a command's ``main`` and turn its exceptions into exit statuses.

    A LimeError prints ``error: …`` on stderr and exits with 2, a PeerLost likewise with 1; an interrupt exits with 130, and an
    output that nobody reads any more, as of ``COMMAND | head``, with 141, as a shell does for SIGINT and SIGPIPE.

    Args:
        speaks: False on ranks whose error another rank most likely prints too: they wait before they print theirs.
    """
    _write_any_text()
    try:
        try:
            _exit_status(main, speaks)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not drop_closed_output():
            raise
        raise SystemExit(141) from None


def _exit_status(main: Callable[[], None], speaks: bool) -> None:
    try:
        main()
    except LimeError as error:
        if not speaks:
            # A launcher ends all processes when one ends. If this one is still alive, no other has printed the error.
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except PeerLost as error:  # every process prints its own; the first line is closest to the cause
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def drop_closed_output() -> bool:
    """Let what nobody can read any more go to /dev/null, so that nothing fails when it is flushed.

    Returns:
        Whether stdout or stderr is a pipe that has no reader.
    """
    dropped = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # None, or not a file
            continue
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
            dropped = True
    return dropped


def _write_any_text() -> None:
    """Let stdout and stderr write characters that their encoding lacks, and names of files that are no UTF-8, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
