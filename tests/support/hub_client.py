"""What tests do with the stand-in for the hub: point the libraries at it, and read a dataset from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import HfFileSystem, constants

from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.sources import hub_requests
from data_tools.sources.documents import documents
from data_tools.sources.hub_file import forget_footers
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally

NAME = "HuggingFaceFW/fineweb-edu"
README = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A data set
"""


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path, offline: bool = False) -> None:
    """Set what the libraries take from the environment once, when they are imported, and an empty cache."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name, value in (("HF_ENDPOINT", url), ("HF_HUB_OFFLINE", offline), ("HF_CACHE_HOME", str(folder / "cache"))):
        monkeypatch.setattr(datasets.config, name, value)
    HfFileSystem.clear_instance_cache()
    hub_requests.signed.clear()
    forget_footers()


def run(given: object, tokenizer: Path, output: Path, *options: str) -> dict[str, Any]:
    pretokenize(
        ["--input", str(given), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", "1",
         "--shard-tokens", "20000", *options]
    )  # fmt: skip
    return json.loads((output / "dataset.json").read_text())


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")}


def read(given: str) -> list[str]:
    tally = Tally()
    texts = [text for *_, text in documents(list_inputs(given), "text", tally)]
    assert not tally.rejected
    return texts
