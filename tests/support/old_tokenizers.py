"""Tokenizer folders as earlier versions wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_tools.tokenizer.facts import FACTS_FILE, OLD_FACTS_FILE


def rename_facts(folder: Path) -> Path:
    """Give the facts of a tokenizer folder their old name; return the folder."""
    (folder / FACTS_FILE).rename(folder / OLD_FACTS_FILE)
    return folder


def copy_as_old(folder: Path, target: Path) -> Path:
    """Copy a tokenizer folder and give the copy's facts their old name; return the copy."""
    shutil.copytree(folder, target)
    return rename_facts(target)
