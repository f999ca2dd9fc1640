"""Tests of the data of a run: what is opened, and what its steps and validations read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.folders import values

from lime_dist.config.load import load_config, make_config
from lime_dist.data import run_data
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.doubtful import doubtful_settings


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


@pytest.mark.parametrize(
    ("given", "micro_batch_size", "replicas", "used", "said"),
    [
        (None, 1, 2, 64, None),
        (None, 5, 1, 60, "validations have 60 samples, a multiple of train.micro_batch_size=5 × 1 replicas that the split allows"),
        (None, 8, 10, 80, "validations have 80 samples"),  # more than 64: at least one micro-batch of each replica
        (None, 10**4, 1, 0, "no validation: the validation split has no full micro-batch of all replicas"),
        (12, 4, 3, 12, None),
        (0, 4, 3, 0, None),
    ],
)  # fmt: skip
def test_validation_samples_that_nobody_set_never_stop_a_run(
    dataset: Path, tmp_path: Path, opened: Counter[str], given: int | None, micro_batch_size: int, replicas: int, used: int,
    said: str | None,
) -> None:  # fmt: skip
    settings = values(dataset, tmp_path)
    settings["train"] |= {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size * replicas}
    settings["train"]["evaluation_samples"] = given
    config = make_config(settings, "a test")
    data = run_data.open_run_data(config, replicas)
    assert data.evaluation_samples == used == data.settled(config).train.evaluation_samples
    assert (data.validation_batches(replicas - 1) is None) == (used == 0)
    line = run_data.describe_evaluation(config, used, replicas)
    assert line is None if said is None else line is not None and line.startswith(said)


def test_a_split_smaller_than_the_default_is_used_as_far_as_it_goes() -> None:
    assert [run_data.fitting_samples(64, available, 6) for available in (5, 6, 17, 59, 60, 1000)] == [
        0,
        6,
        12,
        54,
        60,
        60,
    ]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["train.steps=10"], [r"optimizer.warmup_steps=200 is no less than train.steps=10: .* rises to 5e-05 and never falls"]),
        (["train.steps=200"], [r"rises to 0.001 and never falls"]),
        (["train.steps=201"], []),
        (["train.steps=0"], []),
        (
            ["train.steps=300", "train.global_batch_size=16", "train.batch_ramp={start: 4, increment: 4, samples: 4000}"],
            [r"train.batch_ramp.samples=4000 is more than train.steps=300 consume: the last batch has 4 samples"],
        ),
        (["train.steps=300", "train.global_batch_size=16", "train.batch_ramp={start: 4, increment: 4, samples: 400}"], []),
    ],
)  # fmt: skip
def test_doubtful_settings_are_told(overrides: list[str], lines: list[str]) -> None:
    told = list(doubtful_settings(load_config(None, overrides)))
    assert len(told) == len(lines) and all(re.search(line, text) for line, text in zip(lines, told, strict=True)), told
