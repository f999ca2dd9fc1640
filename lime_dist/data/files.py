"""Files that are either whole or absent: atomic writes, hashes, and folders with one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from lime_dist.errors import LimeError

LONE_SURROGATES = "backslashreplace"
"""How JSON text is encoded whose strings hold lone surrogates, such as Python's names of files that are no UTF-8: the escapes
that take their place are JSON's own, and are read back as the same strings."""


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that renames in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file and rename it, so that ``path`` holds either its old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """JSON in the layout of all our files: keys in the given order, indented by two spaces, UTF-8. Equal values give equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", LONE_SURROGATES)


def json_line(value: Any) -> bytes:
    """JSON on one line, with its end, as `json_bytes`."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", LONE_SURROGATES)


def read_json(path: Path, what_to_do: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        LimeError: the file is missing or holds no JSON object; the message ends with ``what_to_do``.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LimeError(f"{path}: no such file; {what_to_do}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise LimeError(f"{path}: cannot be read ({error}); {what_to_do}") from None
    if not isinstance(value, dict):
        raise LimeError(f"{path}: holds no JSON object; {what_to_do}")
    return value


def read_json_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """Read a file of one JSON object a line that a crash may have damaged; a missing file has no lines.

    A crash or a power cut can leave half a line, NUL bytes, foreign bytes, or half a character. Such lines are dropped.

    Returns:
        (line without its newline, its object) of each readable line, in order; and the number of lines that are not.

    Raises:
        OSError: the file cannot be read.
    """
    whole: list[tuple[bytes, dict[str, Any]]] = []
    dropped = 0
    for raw in path.read_bytes().split(b"\n") if path.exists() else []:
        line = raw.strip(b"\0 \t\r")
        if not raw:
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            whole.append((line, value))
        else:
            dropped += 1
    return whole, dropped


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. The file is read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove(path: Path) -> str | None:
    """Delete a file, a link (never what it points at), or a folder with all that can be deleted in it.

    Returns:
        Why something is left, with its path; None: nothing is.
    """
    problems: list[str] = []

    def note(_: object, where: str, error: tuple[type[BaseException], BaseException, object]) -> None:
        problems.append(f"{where}: {getattr(error[1], 'strerror', None) or error[1]}")

    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, onerror=note)
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
    return problems[0] if problems else None


def free_name(path: Path) -> Path:
    """The path, or with a number behind it if something that could not be deleted has its name."""
    return next(name for name in chain([path], (Path(f"{path}.{n}") for n in count(1))) if not os.path.lexists(name))


class WholeAppends:
    """A file that grows by whole pieces. If the disk is full, pieces are kept and written at the next `flush`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()

    @property
    def waiting(self) -> bool:
        """Whether data has not reached the file yet."""
        return bool(self._waiting)

    def write(self, data: bytes) -> None:
        """Add data; it reaches the file at the next `flush`."""
        self._waiting += data

    def flush(self) -> None:
        """Write all waiting data.

        Raises:
            OSError: it cannot be written. The file is as before, and the data wait for the next `flush`.
        """
        size = os.fstat(self._file.fileno()).st_size
        left = bytes(self._waiting)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Close the file. Data that was not flushed is lost."""
        self._file.close()


@contextmanager
def lock_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Create ``folder`` if needed and lock it for this process. The lock ends with the process.

    On a file system without locks every process gets the lock.

    Args:
        patience: seconds to wait for another process to release the lock.

    Raises:
        LimeError: another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # closed below, when the caller's block ends
    except OSError as error:
        raise LimeError(f"{folder}: cannot be written ({error.strerror}); give another output folder") from None
    with file:
        until = time.monotonic() + patience
        while not _try_lock(file):
            if time.monotonic() >= until:
                raise LimeError(f"{folder}: another run is writing here; wait for it or give another output folder")
            time.sleep(0.1)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
