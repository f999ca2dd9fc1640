"""The records of a pretokenized folder: its finished units while it grows, and dataset.json when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools import TOOL_VERSION
from data_tools.pretokenize.encoding import SPLITS
from data_tools.pretokenize.units import rejection_error
from data_tools.sources.tally import Rejection
from data_tools.tokenizer import Tokenizer
from lime_dist.data.dataset import DATASET_FILE, FORMAT, check_shard_hashes, check_shard_sizes, read_dataset_json
from lime_dist.data.files import (
    json_bytes,
    json_line,
    read_json,
    read_json_lines,
    sha256_file,
    sync_folder,
    write_atomic,
)
from lime_dist.data.indexed import pair_paths, smallest_dtype
from lime_dist.errors import LimeError

UNITS_FILE = "units.ndjson"  # not .jsonl: it must not be read as input if the dataset lies inside an input folder
NAMED_REJECTIONS = 20
COMPARED = ("settings", "inputs", "part")
"""The parts of the header on which the shards depend."""

COUNTED = ("rows", "null", "empty", "filtered", "duplicates")
Result = dict[str, Any]  # what encoding.EncodeUnit returns


def shards_of(results: Iterable[Result]) -> list[dict[str, Any]]:
    """All shards of some units."""
    return [shard for result in results for split in SPLITS for shard in result["shards"][split]]


class Manifest:
    """The finished units of an output folder, in ``units.ndjson``: a header (settings and inputs), then a line per unit.

    Args:
        fresh: delete the folder's shards and records first.

    Raises:
        LimeError: the folder was made with another header.
    """

    def __init__(self, folder: Path, header: dict[str, Any], fresh: bool) -> None:
        self.folder, self.header, self._path = folder, header, folder / UNITS_FILE
        self._told = False  # that unreadable lines were dropped
        if fresh:
            (folder / DATASET_FILE).unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            for path in [path for split in SPLITS for path in folder.glob(f"{split}-*-*.*")]:
                path.unlink()
        recorded = self._recorded_header()
        if recorded is not None and any(recorded.get(key) != header.get(key) for key in COMPARED):
            raise LimeError(
                f"{folder}: was made with {differences(recorded, header)}; give another --output, or --fresh to "
                "replace it"
            )

    def _recorded_header(self) -> dict[str, Any] | None:
        header, _ = self._read()
        if (self.folder / DATASET_FILE).exists():
            try:
                description = read_json(self.folder / DATASET_FILE, "add --fresh to write the dataset again")
            except LimeError:
                if header is None:
                    raise
                return header  # a crash has damaged dataset.json: `finish` writes it again
            return {key: description.get(key) for key in self.header}
        return header

    def _read(self) -> tuple[dict[str, Any] | None, list[Result]]:
        """The header, and the results of units; without a readable header, which must come first, there are none."""
        lines, dropped = read_json_lines(self._path)
        if dropped and not self._told:
            print(f"{self._path}: {dropped} unreadable line(s) dropped, left by a crash")
            self._told = True
        objects = [line for _, line in lines]
        if not objects or not isinstance(objects[0].get("settings"), dict):
            return None, []
        return objects[0], [line for line in objects[1:] if type(line.get("unit")) is int]

    def load(self, units: int, plan: str, verify: bool) -> dict[int, Result]:
        """Return the results of the units whose shards are all there, and keep only these in the file.

        Args:
            plan: `units.plan_hash`; results of another plan do not count. Earlier versions did not record it.
            verify: compare the hashes of shards too, not only their sizes.
        """
        results = {
            result["unit"]: result
            for result in self._read()[1]
            if 0 <= result["unit"] < units and result.get("plan", plan) == plan
        }
        verified = {unit: result for unit, result in sorted(results.items()) if self._holds(result, verify)}
        self.write(verified.values())
        return verified

    def encoder_difference(self) -> str:
        """Why an earlier run on this folder gave up gigatoken; "" if it did not."""
        return next((result["differs"] for result in self._read()[1] if isinstance(result.get("differs"), str)), "")

    def drop_encoded_with(self, encoder: str, results: dict[int, Result]) -> int:
        """Delete the shards of the units that an encoder encoded, and take these out of ``results``; returns how many there were.

        After a kill in between, units without shards do not count, and the others are dropped as soon as the encoder's difference
        is seen again.
        """
        dropped = [results.pop(unit) for unit in list(results) if results[unit].get("encoder") == encoder]
        for shard in shards_of(dropped):
            for path in reversed(pair_paths(self.folder / shard["name"])):
                path.unlink(missing_ok=True)
        self.write(results.values())
        return len(dropped)

    def _holds(self, result: Result, verify: bool) -> bool:
        for shard in shards_of([result]):
            for path, kind in zip(pair_paths(self.folder / shard["name"]), ("bin", "idx"), strict=True):
                if not path.is_file() or path.stat().st_size != shard[f"{kind}_bytes"]:
                    return False
                if verify and sha256_file(path) != shard[f"{kind}_sha256"]:
                    return False
        return True

    def write(self, results: Any) -> None:
        """Replace the file atomically by the header and ``results``."""
        write_atomic(self._path, b"".join(map(json_line, (self.header, *results))))

    def publish(self, result: Result, scratch: Path) -> None:
        """Move a unit's shards into the folder, then record the unit; both are on disk when this returns."""
        for shard in shards_of([result]):
            bin_path, idx_path = pair_paths(self.folder / shard["name"])
            idx_path.unlink(missing_ok=True)  # an old .idx must never lie beside a new .bin
            for scratch_path, path in zip(pair_paths(scratch / shard["name"]), (bin_path, idx_path), strict=True):
                os.replace(scratch_path, path)
        sync_folder(self.folder)
        with open(self._path, "ab") as file:
            file.write(json_line(result))
            file.flush()
            os.fsync(file.fileno())


def recorded_commit(folder: Path, given: str) -> str | None:
    """The commit of the hub dataset ``given`` with which an output folder was begun; None if it was not."""
    headers = [header for _, header in read_json_lines(folder / UNITS_FILE)[0][:1]]
    with suppress(LimeError):  # a missing or damaged file says nothing
        headers.append(read_json(folder / DATASET_FILE, ""))
    records = (header.get("hub") for header in headers)
    return next((one["commit"] for one in records if isinstance(one, dict) and one.get("input") == given), None)


def differences(old: dict[str, Any], new: dict[str, Any], now_is: str = "now") -> str:
    """In what two headers differ, in words: the value of ``old``, and in parentheses that of ``new`` after ``now_is``."""
    then, now = ({"part": one.get("part"), **(one.get("settings") or {})} for one in (old, new))
    changes = [f"{key}={then.get(key)} ({now_is} {now[key]})" for key in now if then.get(key) != now[key]]
    if changes:
        return ", ".join(changes)
    before = {file["name"]: file for file in old.get("inputs") or []}
    after = {file["name"]: file for file in new["inputs"]}
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"other input files ({', '.join(names[:3])}{', …' if len(names) > 3 else ''} differ)"


def is_complete(folder: Path, verify: bool = False) -> bool:
    """Whether the dataset is finished and every shard has its size; if not, print the reason and remove dataset.json.

    Args:
        verify: compare the hashes of shards too.
    """
    if not (folder / DATASET_FILE).exists():
        return False
    try:
        for split in read_dataset_json(folder)["splits"].values():
            for shard in split["shards"]:
                check_shard_sizes(folder, shard)
                if verify:
                    check_shard_hashes(folder, shard)
        return True
    except LimeError as error:
        print(f"no longer complete: {error}")
        (folder / DATASET_FILE).unlink()
        return False


def finish(
    manifest: Manifest, results: list[Result], tokenizer: Tokenizer, source: str, stop: bool, max_rejected: float
) -> None:
    """Check the share of bad rows, write dataset.json and print the summary.

    Raises:
        LimeError: the share is above ``max_rejected``, or ``stop`` is set and there is a bad row; nothing is written.
    """
    rejected = [Rejection(**rejection) for result in results for rejection in result["rejected"]]
    if stop and rejected:
        raise rejection_error(rejected[0])
    counts = {key: sum(result[key] for result in results) for key in COUNTED}
    counts["rejected"] = sum(rejection.rows for rejection in rejected)
    cut_short = {rejection.file for rejection in rejected if not rejection.rows}
    share = max(counts["rejected"] / max(1, counts["rows"]), len(cut_short) / len(manifest.header["inputs"]))
    for rejection in rejected[:NAMED_REJECTIONS]:
        print(f"rejected: {rejection}")
    if len(rejected) > NAMED_REJECTIONS:
        print(f"rejected: {len(rejected) - NAMED_REJECTIONS} more, all listed in {manifest.folder / UNITS_FILE}")
    manifest.write(results)
    if share > max_rejected:
        raise LimeError(
            f"{source}: {counts['rejected']} of {counts['rows']} rows were rejected and {len(cut_short)} of "
            f"{len(manifest.header['inputs'])} files could not be read to their end, above --max-rejected "
            f"{max_rejected}; first: {rejected[0]}; fix the input, or allow more (finished shards are kept)"
        )
    dropped: dict[str, int] = {}
    if all("dropped" in result for result in results):  # earlier versions did not count them
        dropped = {
            one: sum(result["dropped"].get(one, 0) for result in results)
            for one in manifest.header["settings"]["where"]
        }
    splits = {}
    for split in SPLITS:
        shards = [shard for result in results for shard in result["shards"][split]]
        if split == "test" and not shards:
            continue
        sums = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")}
        splits[split] = {**sums, "shards": shards}
    description = {
        "format": FORMAT,
        "tool_version": TOOL_VERSION,
        "source": source,
        "tokenizer": "tokenizer",
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": smallest_dtype(tokenizer.vocab_size).name,
        **manifest.header,
        "counts": counts,
        **({"dropped": dropped} if dropped else {}),
        "rejected": [str(rejection) for rejection in rejected],
        "splits": splits,
    }
    write_atomic(manifest.folder / DATASET_FILE, json_bytes(description))
    for split, facts in splits.items():
        print(f"{split}: {facts['tokens']:,} tokens, {facts['documents']:,} documents, {len(facts['shards'])} shards")
    if not splits["validation"]["documents"]:
        print(
            "warning: the validation split is empty; raise --validation-fraction, or train with train.evaluation_samples=0"
        )
    for condition, count in dropped.items():
        print(f"--where {condition}: dropped {count:,} of {counts['rows']:,} rows")
        if count in (0, counts["rows"] - counts["rejected"]):
            print(
                f"warning: --where {condition} dropped {'all rows' if count else 'no row'}; is this what it should select?"
            )
    print(", ".join(f"{key} {count:,}" for key, count in counts.items()))
    print(f"dataset written: {manifest.folder / DATASET_FILE}")
