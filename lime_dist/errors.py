"""The one exception for mistakes that a user can make, and the guard that turns it into one line and exit status 2."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 5.0


class LimeError(Exception):
    """A mistake of the user's: what was given, where, and what to do instead, in one line."""


class PeerLost(Exception):
    """Another process of the job is gone: which one was missed, by whom and doing what, in one line."""


def run_command(main: Callable[[], None], speaks: bool = True) -> None:
    """Run a command's ``main``; a LimeError prints ``error: …`` on stderr and exits with status 2, an interrupt with 130.

    Args:
        speaks: False on processes whose error another one most likely prints too: they wait before they print theirs.
    """
    try:
        main()
    except LimeError as error:
        if not speaks:
            # Launchers end all processes when the first one ends; one that is alive after this is the only one to know.
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except PeerLost as error:  # each process says what it missed; the first line is the nearest to the cause
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
