"""Tests of the data of a run: what is opened, and what its steps and validations read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.folders import values

from lime_dist.config.load import make_config
from lime_dist.data import run_data
from lime_dist.data.dataset import TokenSplit


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each split has been opened; in one process, where no rank waits for another."""
    counts: Counter[str] = Counter()
    construct = TokenSplit.__init__

    def counted(split: TokenSplit, path: Any, name: str, *arguments: Any) -> None:
        counts[name] += 1
        construct(split, path, name, *arguments)

    monkeypatch.setattr(TokenSplit, "__init__", counted)
    monkeypatch.setattr(run_data, "together", lambda action: action())
    return counts


def test_every_split_is_opened_once(dataset: Path, tmp_path: Path, opened: Counter[str]) -> None:
    config = make_config(values(dataset, tmp_path), "a test")
    data = run_data.open_run_data(config, replicas=2)
    for replica in range(2):
        validation = data.validation_batches(replica)
        assert validation is not None and len(validation) == 2, "4 samples for two replicas"
        tokens, labels = next(data.train_batches(replica, consumed_samples=8))
        assert tokens.shape == labels.shape == (1, 16)
    assert opened == {"train": 1, "validation": 1}


def test_a_run_without_validation_opens_no_validation_split(
    dataset: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    settings = values(dataset, tmp_path)
    settings["train"]["evaluation_samples"] = 0
    data = run_data.open_run_data(make_config(settings, "a test"), replicas=1)
    assert data.validation_batches(0) is None and opened == {"train": 1}
