"""List the files of a folder or a glob. Links are followed; what cannot be listed is an error, so that no file is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from lime_dist.errors import LimeError

ALL = ("**",)
"""The pattern of all files of a folder, at any depth."""

SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def matching_files(folder: Path, pattern: Sequence[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield what a pattern matches in a folder, except folders, as the paths by which it is reached.

    Args:
        pattern: its parts, with the wildcards of `glob`: ``**`` stands for any number of folders, and at the end for all
            files in them. Wildcards match no name that begins with a dot, unless the part does too.
        above: the real paths of the folders through which a ``**`` has led to ``folder``.

    Raises:
        LimeError: a link is broken or leads to a folder that contains it, or a folder cannot be read.
    """
    part, rest = pattern[0], pattern[1:]
    if part == "**":
        real = os.path.realpath(folder)
        if real in above:
            raise LimeError(f"{folder}: leads back to {real}, which contains it; remove this link")
        if rest:
            yield from matching_files(folder, rest)
        names, below, above = _names(folder), pattern, above | {real}
    elif has_magic(part):
        names, below, above = [name for name in _names(folder) if fnmatchcase(name, part)], rest, frozenset()
    else:
        names, below, above = [part] if os.path.lexists(folder / part) else [], rest, frozenset()
    for path in (folder / name for name in names if part.startswith(".") or not name.startswith(".")):
        if not is_folder(path):
            if not rest:
                yield path
        elif below:
            yield from matching_files(path, below, above)


def special_file(path: Path) -> str:
    """What kind of special file a path is, in words; "" for an ordinary file."""
    return SPECIAL_FILES.get(stat.S_IFMT(path.stat().st_mode), "")


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, or a link to one.

    Raises:
        LimeError: it is a broken link, or nothing can be known about it.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if not path.is_symlink():
            raise LimeError(f"{path}: cannot be read ({error.strerror}); give other files") from None
        reason = "in a circle" if error.errno == errno.ELOOP else f"and cannot be followed ({error.strerror})"
        raise LimeError(f"{path}: a link to {os.readlink(path)}, {reason}; repair or remove it") from None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise LimeError(f"{folder}: cannot be read ({error.strerror}); make it readable, or give other files") from None
