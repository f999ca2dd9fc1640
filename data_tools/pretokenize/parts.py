"""Parts of a dataset, each written by a job of its own: which units a part has, and how the parts become one dataset.

A finished part has ``part.json`` in its folder instead of dataset.json. Joined, the parts are equal to what one run writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_tools.pretokenize.encoding import SPLITS
from data_tools.pretokenize.manifest import UNITS_FILE, Manifest, Result, differences, shards_of
from data_tools.pretokenize.units import Unit
from lime_dist.data.dataset import check_shard_hashes, check_shard_sizes
from lime_dist.data.files import json_bytes, read_json, read_json_lines, write_atomic
from lime_dist.errors import LimeError

PART_FILE = "part.json"
FORMAT = "lime_dist part 1"
AGAIN = "run its command again"

Units = TypeVar("Units", list[Unit], range)


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1: every count-th unit of the plan."""

    number: int
    count: int

    @classmethod
    def parse(cls, given: str) -> Part:
        """Read ``NUMBER/COUNT``.

        Raises:
            LimeError: it is something else, or the number is not in [1, count].
        """
        match = re.fullmatch(r"(\d+)/(\d+)", given, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise LimeError(f"--part {given}: give NUMBER/COUNT with a number from 1 to the count, for example 3/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, units: Units) -> Units:
        """The units of this part; neighbours are in different parts, so that all have a share of every file."""
        return units[self.number - 1 :: self.count]


def finish_part(manifest: Manifest, results: list[Result], facts: dict[str, Any]) -> None:
    """Record that a part is finished, and print what it holds. The share of bad rows is checked when parts are joined.

    Args:
        facts: what `merge` needs besides the header: ``source``, ``plan``, ``units`` (of all parts) and ``max_rejected``.
    """
    manifest.write(results)
    write_atomic(manifest.folder / PART_FILE, json_bytes({"format": FORMAT, **facts, **manifest.header}))
    for split in SPLITS:
        shards = [shard for result in results for shard in result["shards"][split]]
        if shards:
            tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
            print(f"{split}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards")
    print(f"part {manifest.header['part']} written: {manifest.folder}; join all parts with data_tools.merge")


def is_complete_part(folder: Path, verify: bool) -> bool:
    """Whether a part is finished and every shard has its size; if not, print the reason and remove part.json.

    Args:
        verify: compare the hashes of shards too.
    """
    if not (folder / PART_FILE).exists():
        return False
    try:
        _, results = read_part(folder)
        for shard in shards_of(results) if verify else ():
            check_shard_hashes(folder, shard, UNITS_FILE)
        return True
    except LimeError as error:
        print(f"no longer complete: {error}")
        (folder / PART_FILE).unlink()
        return False


def is_part(folder: Path) -> bool:
    """Whether a folder was made with ``--part``, finished or not."""
    if (folder / PART_FILE).exists():
        return True
    return any("part" in header for _, header in read_json_lines(folder / UNITS_FILE)[0][:1])


def read_part(folder: Path) -> tuple[dict[str, Any], list[Result]]:
    """The content of part.json, and the results of the part's units.

    Raises:
        LimeError: the part is not finished, or a shard is missing or has another size.
    """
    facts = read_json(folder / PART_FILE, f"the part is not finished: {AGAIN}")
    lines = [line for _, line in read_json_lines(folder / UNITS_FILE)[0]]
    results = [line for line in lines[1:] if line.get("plan") == facts.get("plan")]
    numbers = {result["unit"] for result in results}
    if facts.get("format") != FORMAT or len(numbers) != len(Part.parse(facts["part"]).of(range(facts["units"]))):
        raise LimeError(f"{folder / UNITS_FILE}: does not list the units of the part; {AGAIN}")
    for shard in shards_of(results):
        check_shard_sizes(folder, shard, UNITS_FILE)
    return facts, results


def check_parts(folders: list[Path], facts: list[dict[str, Any]]) -> None:
    """Check that folders hold all parts of one plan, each once.

    Raises:
        LimeError: they do not; the message says which part is missing or different.
    """
    first, given = facts[0], dict[int, Path]()
    count = Part.parse(first["part"]).count
    other = f"; only parts of one dataset can be joined: {AGAIN} with the same options"
    for folder, one in zip(folders, facts, strict=True):
        part = Part.parse(one["part"])
        if part.count != count:
            raise LimeError(f"{folder}: is part {part}, but {folders[0]} is part {first['part']}{other}")
        if any(one.get(key) != first.get(key) for key in ("settings", "inputs")):
            changes = differences({**one, "part": None}, {**first, "part": None}, f"in {folders[0]}:")
            raise LimeError(f"{folder}: was made with {changes}{other}")
        if (one["plan"], one["units"]) != (first["plan"], first["units"]):
            raise LimeError(f"{folder}: was made by another plan than {folders[0]}{other}")
        if part.number in given:
            raise LimeError(f"{folder}: is part {part}, as is {given[part.number]}; give each part once")
        given[part.number] = folder
    if missing := [f"{number}/{count}" for number in range(1, count + 1) if number not in given]:
        raise LimeError(
            f"part{'s' if len(missing) > 1 else ''} {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''} missing; "
            f"give the folders of all {count} parts, once each has finished"
        )


def check_encoders(folders: list[Path], results: list[list[Result]]) -> None:
    """Check that no part keeps ids of an encoder that gave a document of another part other ids than the tokenizer's own.

    Raises:
        LimeError: one does.
    """
    different = [
        (folder, result) for folder, own in zip(folders, results, strict=True) for result in own if "differs" in result
    ]
    if not different:
        return
    where, caught = different[0]
    for folder, own in zip(folders, results, strict=True):
        if doubtful := [result["encoder"] for result in own if result.get("encoder") != caught.get("encoder")]:
            raise LimeError(
                f"{folder}: has ids of {doubtful[0]}, which differ in {where} ({caught['differs']}); write this part again with "
                f"--encoder {caught.get('encoder')} --fresh"
            )
