"""Keep finished runs in one small file: a table can be made again, or a study go on, without the folders of its runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import write

from lime_dist.config.schema import Config
from lime_dist.errors import LimeError

KEYS = ("run", "seed", "settings", "data", "records")
RECORDED = ("step", "tokens", "validation_loss")


@dataclass(frozen=True)
class KeptRuns:
    """Runs that have ended, one line of JSON for each: name, seed, settings, data, and the validation losses by step.

    Attributes:
        path: the file; it may not exist yet.
        data: digest of the data of the runs to read and to add, of :func:`data_digest`.
    """

    path: Path
    data: str

    def records(self, config: Config, seed: int) -> list[dict[str, float]]:
        """Return the validation records of the run with these settings and seed; [] if it is not there."""
        key = {"seed": seed, "settings": settings_digest(config), "data": self.data}
        for line in read_lines(self.path):
            if key.items() <= line.items():
                return [dict(zip(RECORDED, record, strict=True)) for record in line["records"]]
        return []

    def add(self, name: str, config: Config, seed: int, records: list[dict[str, float]]) -> None:
        """Add a run, unless it is there. Nobody else may write the file meanwhile."""
        if self.records(config, seed):
            return
        losses = [[record[key] for key in RECORDED] for record in records if "validation_loss" in record]
        line = {
            "run": name, "seed": seed, "settings": settings_digest(config), "data": self.data, "records": losses,
        }  # fmt: skip
        lines = [*read_lines(self.path), line]
        write(self.path, "".join(json.dumps(each) + "\n" for each in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of runs; [] if there is none.

    Raises:
        LimeError: the file cannot be read.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise LimeError(f"{path} is no file of finished runs: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not set(KEYS) <= line.keys():
            raise LimeError(f"{path} is no file of finished runs: line {number} lacks one of {', '.join(KEYS)}")
    return lines


def settings_digest(config: Config) -> str:
    """Return a digest of what a run changes from the defaults, without its folder, data, seeds, checkpoints and records.

    A default that changes between versions is not noticed.
    """
    changed = config.model_dump(mode="json", exclude_defaults=True)
    for section in ("run", "checkpoint", "monitor"):
        changed.pop(section, None)
    for section, key in (
        ("data", "path"), ("data", "seed"), ("train", "seed"), ("train", "log_interval"), ("train", "checkpoint_interval"),
    ):  # fmt: skip
        changed.get(section, {}).pop(key, None)
    return digest(changed)


def data_digest(shards: Path) -> str:
    """Return a digest of what a data set was made from and how, the same on every machine.

    Raises:
        LimeError: the folder holds no data set.
    """
    try:
        facts = json.loads((shards / "dataset.json").read_text())
        sources = [(file["name"], file["sha256"]) for file in facts["inputs"]]
        settings = {key: value for key, value in facts["settings"].items() if key != "tool_version"}
    except (OSError, ValueError, KeyError) as error:
        raise LimeError(f"--data {shards} holds no data set: {error}") from None
    return digest([sources, settings])


def only_data_digest(path: Path) -> str:
    """Return the digest of the data of all runs in a file.

    Raises:
        LimeError: it is not there, or has runs on different data.
    """
    if not path.exists():
        raise LimeError(f"{path} is not there; give the --runs to read, or --data to train")
    found = {line["data"] for line in read_lines(path)}
    if len(found) != 1:
        raise LimeError(f"{path} has runs on {len(found)} data sets; give --data, to say which")
    return str(found.pop())


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
