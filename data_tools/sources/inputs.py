"""Which files there are to read: of a folder, a glob, or a dataset of the Hugging Face hub; their sizes and fingerprints."""

from __future__ import annotations

import glob
import gzip
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lime_dist.errors import LimeError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
INPUT_HELP = (
    "folder, glob or file of parquet or JSONL (.gz, .zst); or hub:OWNER/NAME[@REVISION][:CONFIGURATION], for example "
    "hub:HuggingFaceFW/fineweb-edu:sample-10BT"
)
COMPRESSION_RATIO = 4  # expected of gz and zst, for estimates alone
PROBES, PROBE_BYTES = 64, 1 << 20
_HUB = re.compile(r"hub:(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<configuration>.+))?")


@dataclass(frozen=True)
class InputFile:
    """A file to read: ``path`` on this machine or a URL, and ``name`` within the input, for outputs and messages."""

    path: str
    name: str

    @property
    def is_parquet(self) -> bool:
        """Parquet, else JSONL."""
        return self.name.endswith(".parquet")

    @property
    def is_remote(self) -> bool:
        """Whether a network may stand between: what cannot be read may be readable a moment later."""
        return "://" in self.path

    def open(self) -> IO[bytes]:
        """The file's bytes, seekable."""
        if not self.is_remote:
            return open(self.path, "rb")
        import fsspec

        system, path = fsspec.core.url_to_fs(self.path)
        return system.open(path, "rb")

    @cached_property
    def size(self) -> int:
        """Bytes."""
        if not self.is_remote:
            return Path(self.path).stat().st_size
        import fsspec

        system, path = fsspec.core.url_to_fs(self.path)
        return int(system.size(path))

    @property
    def text_bytes(self) -> int:
        """About how much text a JSONL file holds."""
        return self.size * (COMPRESSION_RATIO if self.name.endswith((".gz", ".zst")) else 1)


def list_inputs(given: str) -> list[InputFile]:
    """The files of a folder (searched through), a glob, one file or a hub dataset, by name; LimeError if there are none."""
    kinds = ", ".join(SUFFIXES)
    root = Path(given)
    if given.startswith("hub:"):
        files = _hub_files(given)
    elif root.is_dir():
        visible = (path for path in root.rglob("*") if "/." not in f"/{path.relative_to(root).as_posix()}")
        files = [InputFile(str(path), path.relative_to(root).as_posix()) for path in visible if path.is_file()]
    elif root.is_file():
        files = [InputFile(given, root.name)]
    else:
        found = [path for path in map(Path, glob.glob(given, recursive=True)) if path.is_file()]
        if not found:
            raise LimeError(f"--input {given}: no such file or folder, and no file matches; give one with {kinds}")
        # Names are relative to the last folder before the first wildcard: two files of one name stay apart.
        fixed = Path(*root.parts[: next(i for i, part in enumerate(root.parts) if glob.has_magic(part))])
        files = [InputFile(str(path), path.relative_to(fixed).as_posix()) for path in found]
    usable = sorted((file for file in files if file.name.endswith(SUFFIXES)), key=lambda file: file.name)
    if not usable:
        raise LimeError(f"--input {given}: no {kinds} among {len(files)} files; give text in one of these forms")
    return usable


def _hub_files(given: str) -> list[InputFile]:
    """The files of a hub dataset's training split, as `datasets` finds them, pinned to one commit by their URLs."""
    found = _HUB.fullmatch(given)
    if found is None:
        raise LimeError(f"--input {given}: give hub:OWNER/NAME[@REVISION][:CONFIGURATION]")
    import datasets

    try:
        builder = datasets.load_dataset_builder(found["name"], name=found["configuration"], revision=found["revision"])
        paths = [str(path) for path in (builder.config.data_files or {}).get("train", [])]
    except Exception as error:  # the hub's errors come from half a dozen libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LimeError(
            f"--input {given}: {reason}; check the name, the configuration and the network, or give local files"
        ) from None
    here = f"{Path(found['name']).absolute()}/"  # of a dataset folder on this machine
    names = [path.split("://")[-1].removeprefix(here) for path in paths]
    return [InputFile(path, name) for path, name in zip(paths, names, strict=True)]


def fingerprint(file: InputFile) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file; of one over 64 MiB, of 64 blocks of 1 MiB spread evenly from end to end.

    A remote file has no SHA-256 here: its name holds the commit, and reading it for a hash would be a second download.
    """
    if file.is_remote:
        return {"name": file.name, "bytes": file.size}
    digest, size = hashlib.sha256(), file.size
    with file.open() as stream:
        for probe in range(PROBES):
            if size > PROBES * PROBE_BYTES:
                stream.seek((size - PROBE_BYTES) * probe // (PROBES - 1))
            digest.update(stream.read(PROBE_BYTES))
    return {"name": file.name, "bytes": size, "sha256": digest.hexdigest()}


def row_group_bytes(file: InputFile, text_column: str) -> list[int]:
    """Bytes of text, before compression, in each row group of a parquet file; [] if its footer cannot be read."""
    try:
        with open_parquet(file) as reader:
            paths = [reader.schema.column(i).path for i in range(len(reader.schema))]
            column = paths.index(text_column) if text_column in paths else 0
            groups = (reader.metadata.row_group(i) for i in range(reader.metadata.num_row_groups))
            return [group.column(column).total_uncompressed_size for group in groups]
    except (pa.ArrowException, OSError) as error:
        raise_if_unreachable(file, error)
        return []


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """A reader. Page checksums, where a file has them, find damage that would decode to other text."""
    reader = pq.ParquetFile(file.open() if file.is_remote else file.path, page_checksum_verification=True)
    try:
        yield reader
    finally:
        reader.close(force=True)


def raise_if_unreachable(file: InputFile, error: BaseException) -> None:
    """A network's failure says nothing of a file's content; pyarrow's and gzip's own errors do."""
    damage = isinstance(error, (pa.ArrowInvalid, gzip.BadGzipFile)) or not isinstance(error, OSError)
    if file.is_remote and not damage:
        raise error
