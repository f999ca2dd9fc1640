"""The one exception for mistakes that a user can make, and the guard that turns it into one line and exit status 2."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 5.0


class LimeError(Exception):
    """A mistake of the user's: what was given, where, and what to do instead, in one line."""


def run_command(main: Callable[[], None], speaks: bool = True) -> None:
    """Run a command's ``main``; a LimeError prints ``error: …`` on stderr and exits with status 2, an interrupt with 130.

    Args:
        speaks: False on processes whose error another one prints.
    """
    try:
        main()
    except LimeError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # launchers end all processes when the first one ends; let the one that speaks come first
            time.sleep(GRACE_SECONDS)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
