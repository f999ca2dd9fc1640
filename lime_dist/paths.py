"""Paths as users write them: ``~``, ``~user``, ``$NAME`` and ``${NAME}`` are expanded, as a shell would."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lime_dist.errors import LimeError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")


def expand(text: str) -> str:
    """Expand ``~`` at the beginning of a path, and variables of the environment anywhere in it.

    Raises:
        LimeError: there is no such user, or a variable is not set or empty. (An empty one would make another path of it.)
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        if not os.environ.get(name):
            if os.path.lexists(text):  # the file's name has a dollar sign
                return match[0]
            raise LimeError(f"the path {text!r}: the variable {name} is not set; set it, or write the path out")
        return os.environ[name]

    user, slash, rest = text.partition("/") if text.startswith("~") else ("", "", text)
    home = os.path.expanduser(user)
    if user and home == user:
        raise LimeError(
            f"the path {text!r}: there is no user {user[1:]!r}; for a name that begins with ~ write ./{text}"
        )
    return home + slash + _VARIABLE.sub(value, rest)


def user_path(text: str) -> Path:
    """The path that a user has given to a command, for ``type=`` of argparse."""
    return Path(expand(text))
