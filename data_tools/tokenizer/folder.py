"""Write a tokenizer folder: first into a folder inside it, where the tokenizer is checked, then in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_tools.tokenizer.facts import FACTS_FILE, FORMAT, MODEL_FILES, OLD_FACTS_FILE, remove_old_facts
from lime_dist.data.files import json_bytes, read_json, sync_folder, write_atomic
from lime_dist.errors import LimeError

SCRATCH = ".new"


def existing_facts(output: Path) -> dict[str, Any] | None:
    """The facts of the tokenizer in a folder, or None if there is none.

    Raises:
        LimeError: the folder holds files of these names that another program wrote.
    """
    for name in (FACTS_FILE, OLD_FACTS_FILE):
        if (output / name).exists():
            facts = read_json(output / name, "give another --output")
            if facts.get("format") == FORMAT:
                return facts
    foreign = [name for name in (FACTS_FILE, OLD_FACTS_FILE, *MODEL_FILES.values()) if (output / name).exists()]
    if foreign and not (output / SCRATCH).exists():  # with it, an interrupted run left them
        raise LimeError(f"{output}: holds a {foreign[0]} that is not this program's; give another --output")
    return None


def write_scratch(output: Path, model: bytes, facts: dict[str, Any]) -> Path:
    """Write a tokenizer into a folder inside ``output``, where it can be opened and checked; returns that folder."""
    scratch = output / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write_atomic(scratch / MODEL_FILES[facts["kind"]], model)
    write_atomic(scratch / FACTS_FILE, json_bytes(facts))
    return scratch


def replace_folder(scratch: Path, output: Path) -> None:
    """Move the files of a checked tokenizer from ``scratch`` into ``output``, facts last, and remove ``scratch``."""
    remove_old_facts(output)
    for name in (FACTS_FILE, *MODEL_FILES.values()):
        (output / name).unlink(missing_ok=True)
    for name in (*MODEL_FILES.values(), FACTS_FILE):
        if (scratch / name).exists():
            (scratch / name).replace(output / name)
    sync_folder(output)
    shutil.rmtree(scratch)
