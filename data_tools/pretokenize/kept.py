"""Texts of units of the hub that have been hashed, kept on disk until they are encoded, so that they are fetched once.

FOLDER/00000.arrow      the selected texts of a unit, compressed, in batches of an Arrow stream
FOLDER/00000.json       what its reader counted
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from data_tools.pretokenize.units import Unit
from data_tools.sources.inputs import HubInputFile
from data_tools.sources.tally import Rejection, Tally
from lime_dist.data.files import json_bytes, read_json, write_atomic
from lime_dist.errors import LimeError

SCHEMA = pa.schema([("text", pa.large_string())])
ROWS_AT_ONCE = 256


def is_remote(unit: Unit) -> bool:
    """Whether a unit's texts come over a network."""
    return any(isinstance(file, HubInputFile) for file, _ in unit.parts)


def keep(folder: Path, unit: Unit, texts: Iterator[str], tally: Tally) -> Iterator[str]:
    """Yield the texts of a unit, and write them down; when all have been read they are on disk, with what ``tally`` counted."""
    path, facts = _paths(folder, unit.index)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with open(temporary, "wb") as file:
        with pa.ipc.new_stream(file, SCHEMA, options=options) as writer:
            batch: list[str] = []
            for text in texts:
                batch.append(text)
                yield text
                if len(batch) == ROWS_AT_ONCE:
                    writer.write(pa.record_batch([batch], SCHEMA))
                    batch = []
            writer.write(pa.record_batch([batch], SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    write_atomic(facts, json_bytes(asdict(tally)))  # this also makes the renaming durable


def kept(folder: Path, unit: Unit, tally: Tally) -> Iterator[str] | None:
    """The texts of a unit; None if they are not there. ``tally``, which is empty, gets what their reader counted."""
    path, facts_path = _paths(folder, unit.index)
    if not path.exists():
        return None
    try:
        facts = read_json(facts_path, "")
        rejected = [Rejection(**one) for one in facts.pop("rejected")]
        counted = Tally(**{**facts, "dropped": Counter(facts["dropped"]), "rejected": rejected})
    except (LimeError, KeyError, TypeError):  # a crash has damaged it
        return None
    vars(tally).update(vars(counted))
    return _read(path)


def forget(folder: Path, unit: int) -> None:
    """Delete the texts of a unit."""
    for path in _paths(folder, unit):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        try:
            for batch in pa.ipc.open_stream(file):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise LimeError(f"{path}: is damaged ({error}); delete it and run the same command again") from None


def _paths(folder: Path, unit: int) -> tuple[Path, Path]:
    return folder / f"{unit:05d}.arrow", folder / f"{unit:05d}.json"
