"""Units of pretokenization: consecutive row groups or files of the input that one worker reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.sources.documents import read_file
from data_tools.sources.filters import Filter
from data_tools.sources.footers import Footers, read_footers
from data_tools.sources.inputs import InputFile
from data_tools.sources.tally import Rejection, Tally
from lime_dist.errors import LimeError

BYTES_PER_TOKEN = 4  # expected; only affects how much text makes a unit
UNITS_WANTED, SMALLEST_UNIT = 64, 4 << 20


@dataclass(frozen=True)
class Unit:
    """Consecutive parts of the input.

    Attributes:
        index: the unit's position among all units.
        parts: (file, (first, end) of its row groups, or None for the whole file).
        text_bytes: an estimate.
    """

    index: int
    parts: tuple[tuple[InputFile, tuple[int, int] | None], ...]
    text_bytes: int

    def __str__(self) -> str:
        names = list(dict.fromkeys(file.name for file, _ in self.parts))
        return f"unit {self.index} ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})"


@dataclass(frozen=True)
class Selection:
    """Which documents of the input to use; with ``stop_at_rejection``, the first bad row is an error."""

    text_column: str
    filters: tuple[Filter, ...] = ()
    stop_at_rejection: bool = False


def plan_units(
    files: list[InputFile], text_column: str, shard_tokens: int, footers: Footers | None = None
) -> list[Unit]:
    """Cut the input into units, in order. They depend only on the input and ``shard_tokens``, never on the workers.

    A unit holds the text of about one shard, or less if the input is so small that there would be fewer than 64 units.

    Args:
        footers: what is known of the files of the hub, and where it is recorded.
    """

    pieces: list[tuple[InputFile, tuple[int, int] | None, int]] = []
    for file, groups in zip(files, read_footers(files, text_column, footers), strict=True):
        pieces += [(file, (group, group + 1), size) for group, size in enumerate(groups)]
        if not groups:
            pieces.append((file, None, file.text_bytes))
    total = sum(size for *_, size in pieces)
    target = min(shard_tokens * BYTES_PER_TOKEN, max(total // UNITS_WANTED, SMALLEST_UNIT))
    units: list[Unit] = []
    parts: list[tuple[InputFile, tuple[int, int] | None]] = []
    held = 0
    for file, groups_of_part, size in pieces:
        if parts and held + size > target:
            units.append(Unit(len(units), tuple(parts), held))
            parts, held = [], 0
        before = parts[-1] if parts else None
        if before and before[0] == file and before[1] and groups_of_part:
            parts[-1] = (file, (before[1][0], groups_of_part[1]))
        else:
            parts.append((file, groups_of_part))
        held += size
    return [*units, Unit(len(units), tuple(parts), held)]


def plan_hash(units: list[Unit]) -> str:
    """What identifies a plan: results of units belong together only if they have the same one."""
    plan = [[(file.name, groups) for file, groups in unit.parts] for unit in units]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def unit_documents(unit: Unit, selection: Selection, tally: Tally) -> Iterator[str]:
    """Yield the texts of a unit's documents, in order.

    Raises:
        LimeError: a row is bad and the selection allows none.
    """
    for file, row_groups in unit.parts:
        for _, text in read_file(file, selection.text_column, tally, row_groups, selection.filters):
            _refuse(selection, tally)
            yield text
        _refuse(selection, tally)


def _refuse(selection: Selection, tally: Tally) -> None:
    if selection.stop_at_rejection and tally.rejected:
        raise rejection_error(tally.rejected[0])


def rejection_error(rejection: Rejection) -> LimeError:
    """The error of ``--on-error stop``."""
    return LimeError(f"{rejection}; fix the file, or skip and count such rows with --on-error skip")
