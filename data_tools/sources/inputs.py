"""List the files of an input (a folder, a glob, or a dataset of the Hugging Face hub), with sizes and fingerprints."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.sources.hub import HubFileFacts, hub_dataset, whole_content
from data_tools.sources.hub_file import HubFile, RemoteParquet, forget_footers
from data_tools.sources.hub_requests import HubError
from data_tools.sources.tally import reason_of
from data_tools.sources.walk import ALL, is_folder, matching_files, special_file
from lime_dist.errors import LimeError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
INPUT_HELP = (
    "folder, glob or file of parquet or JSONL (.gz, .zst); or hub:OWNER/NAME[@REVISION][:CONFIGURATION], for example "
    "hub:HuggingFaceFW/fineweb-edu:sample-10BT"
)
COMPRESSION_RATIO = 4  # expected for gz and zst; only used for estimates
PROBES, PROBE_BYTES = 64, 1 << 20
FOOTER_ATTEMPTS = 3


@dataclass(frozen=True)
class InputFile:
    """A file to read: ``path`` is where it lies; ``name`` identifies it within the input, in outputs and messages."""

    path: str
    name: str

    @property
    def is_parquet(self) -> bool:
        """True for parquet, False for JSONL."""
        return self.name.endswith(".parquet")

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes, seekable."""
        return open(self.path, "rb")

    @cached_property
    def size(self) -> int:
        """The file's size in bytes."""
        return Path(self.path).stat().st_size

    @property
    def text_bytes(self) -> int:
        """An estimate of the bytes of text in a JSONL file."""
        return self.size * (COMPRESSION_RATIO if self.name.endswith((".gz", ".zst")) else 1)


@dataclass(frozen=True)
class HubInputFile(InputFile):
    """A file of a hub dataset at a commit; ``path`` is its address."""

    facts: HubFileFacts
    commit: str

    def open(self) -> IO[bytes]:
        """Open the file for reading it from its beginning to its end; its content is checked."""
        if self.facts.sha256 is not None:
            return HubFile.whole(self.path, self.facts.size, self.facts.sha256)
        try:  # a small file in git itself, for which the hub need not know ranges
            return io.BytesIO(whole_content(self.facts))
        except HubError as error:
            raise LimeError(f"{error}; run the same command again") from None

    @property
    def size(self) -> int:  # type: ignore[override]  # known here, found out there
        """The file's size in bytes."""
        return self.facts.size


class RemoteDamage(LimeError):
    """A remote file that cannot be decoded as it has arrived. It is not believed until it has arrived so twice."""


def list_inputs(given: str, commit: str | None = None) -> list[InputFile]:
    """List the files of a folder (recursively), a glob, one file or a hub dataset, sorted by name; each real file once.

    Args:
        commit: the commit of a hub dataset to use, whatever its revision is by now.

    Raises:
        LimeError: there are none, or a link, a folder or a special file is in the way.
    """
    kinds, place = ", ".join(SUFFIXES), Path(given)
    if given.startswith("hub:"):
        files = _hub_files(given, commit)
    elif os.path.lexists(place) and not is_folder(place):
        files = [InputFile(given, place.name)]
    elif place.is_dir():
        files = _files_below(place, ALL)
    else:
        # Names are relative to the last folder before the first wildcard, so that files in different folders keep
        # different names.
        fixed = next((i for i, part in enumerate(place.parts) if glob.has_magic(part)), len(place.parts) - 1)
        files = _files_below(Path(*place.parts[:fixed]), place.parts[fixed:])
        if not files:
            raise LimeError(f"--input {given}: no such file or folder, and no file matches; give one with {kinds}")
    usable = sorted((file for file in files if file.name.endswith(SUFFIXES)), key=lambda file: file.name)
    if not usable:
        raise LimeError(f"--input {given}: no {kinds} among {len(files)} files; give text in one of these formats")
    return usable if isinstance(usable[0], HubInputFile) else _each_once(usable)


def _files_below(root: Path, pattern: Sequence[str]) -> list[InputFile]:
    return [InputFile(str(path), path.relative_to(root).as_posix()) for path in set(matching_files(root, pattern))]


def _each_once(files: list[InputFile]) -> list[InputFile]:
    """Leave out further names of the same file, and say so; a name without a link comes before others.

    Raises:
        LimeError: a name is that of a pipe, a socket or a device.
    """
    names: dict[str, list[InputFile]] = {}
    for file in files:
        if kind := special_file(Path(file.path)):
            raise LimeError(f"{file.path}: is {kind}, not a file; remove it, or give other files")
        names.setdefault(os.path.realpath(file.path), []).append(file)
    for real, several in names.items():
        several.sort(key=lambda file: not real.endswith(f"/{file.name}"))
        for other in several[1:]:
            print(f"{other.path}: is the file {several[0].path}, which is read once")
    return sorted((several[0] for several in names.values()), key=lambda file: file.name)


def _hub_files(given: str, commit: str | None) -> list[InputFile]:
    dataset = hub_dataset(given, commit)
    return [HubInputFile(file.address, file.path, file, dataset.commit) for file in dataset.files]


def fingerprint(file: InputFile) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file; above 64 MiB, the SHA-256 covers 64 evenly spread pieces of 1 MiB.

    That of a remote file is what the hub says, so that nothing is downloaded for it.
    """
    if isinstance(file, HubInputFile):
        return {"name": file.name, "bytes": file.size, "sha256": file.facts.sha256 or file.facts.git_hash}
    digest, size = hashlib.sha256(), file.size
    with file.open() as stream:
        for probe in range(PROBES):
            if size > PROBES * PROBE_BYTES:
                stream.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
            digest.update(stream.read(PROBE_BYTES))
    return {"name": file.name, "bytes": size, "sha256": digest.hexdigest()}


def row_group_bytes(file: InputFile, text_column: str) -> list[int]:
    """Uncompressed bytes of text in each row group of a parquet file; [] if the footer of a local file cannot be read.

    Raises:
        LimeError: the footer of a remote file cannot be read, in several attempts.
    """
    for attempt in range(FOOTER_ATTEMPTS):
        try:
            return _row_group_bytes(file, text_column)
        except (pa.ArrowException, OSError) as error:
            if not isinstance(file, HubInputFile):
                return []
            if attempt == FOOTER_ATTEMPTS - 1:
                raise LimeError(
                    f"{file.name}: its footer cannot be read ({error}); run the same command again"
                ) from None
            forget_footers()
    raise AssertionError("unreachable")


def _row_group_bytes(file: InputFile, text_column: str) -> list[int]:
    with open_parquet(file) as reader:
        paths = [reader.schema.column(i).path for i in range(len(reader.schema))]
        if not paths:
            return []
        column = paths.index(text_column) if text_column in paths else 0
        groups = (reader.metadata.row_group(i) for i in range(reader.metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """Open a parquet file. Page checksums, if the file has them, detect damage that would decode to different text."""
    if isinstance(file, HubInputFile) and file.facts.sha256 is not None:
        reader = RemoteParquet(file.path, file.size)
    else:
        by_name = not isinstance(file, HubInputFile) and is_utf8(file.path)  # pyarrow takes no other names
        reader = pq.ParquetFile(file.path if by_name else file.open(), page_checksum_verification=True)
    try:
        yield reader
    finally:
        reader.close(force=True)


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a text, which it cannot if the text holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def raise_if_remote(file: InputFile, error: BaseException) -> None:
    """Raise a RemoteDamage if a file that cannot be decoded has come over a network: no row is given up because of that."""
    if isinstance(file, HubInputFile):
        forget_footers()
        reason = reason_of(error)
        raise RemoteDamage(f"{file.name}: has arrived damaged ({reason})")
