"""Tests of resuming: a stopped run ends with the same losses and weights as one without a stop, also with another layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import numbers, records, values, weights
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.checkpoint.manifest import manifest_checksum
from lime_dist.monitor.metrics import without_clock

Workers = Callable[[int], WorkerGroup]


@pytest.fixture(scope="module")
def straight(workers: Workers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on 2 stages without a stop."""
    directory = tmp_path_factory.mktemp("straight")
    assert set(workers(2).run("support.runs.run", values=values(dataset, directory, pipeline_stages=2))) == {""}
    return directory


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """The straight run as a kill after step 13 leaves it: the checkpoint of step 10 and records of later steps."""
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    shutil.rmtree(directory / "checkpoints/global_step20")
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    after = [line for line in lines if json.loads(line)["step"] <= 13]
    (directory / "metrics.jsonl").write_text("".join(after) + '{"step": 14, "lo')
    return directory


def test_metrics_and_tensorboard_of_a_run(straight: Path) -> None:
    steps = [record for record in records(straight) if "loss" in record]
    keys = {
        "step",
        "consumed_samples",
        "tokens",
        "loss",
        "grad_norm",
        "lr",
        "router_lr",
        "step_seconds",
        "tokens_per_second",
    }
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert all(set(without_clock(record)) == without_clock(dict.fromkeys(keys, 0)).keys() for record in steps)
    assert all(keys <= set(record) for record in steps)
    assert steps[-1]["consumed_samples"] == 80 and steps[-1]["tokens"] == 80 * 16
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1, "it learns"
    evaluations = [record["step"] for record in records(straight) if "validation_loss" in record]
    assert evaluations == [5, 10, 15, 20]
    events = EventAccumulator(str(straight / "tensorboard")).Reload()
    logged = events.Scalars("train/loss")
    assert [event.step for event in logged] == list(range(1, 21))
    assert [event.value for event in logged] == pytest.approx([record["loss"] for record in steps])
    for tag in ("validation/loss", "train/learning_rate", "train/router_learning_rate", "train/gradient_norm",
                "speed/tokens_per_second", "speed/step_seconds"):  # fmt: skip
        assert events.Scalars(tag), tag
    assert {"config.yaml", "environment.txt"} <= {path.name for path in straight.iterdir()}


def test_resume_is_bit_for_bit(workers: Workers, dataset: Path, straight: Path, stopped: Path) -> None:
    """20 steps without a stop equal 10 + 10 in every record, weight and optimizer state."""
    assert set(workers(2).run("support.runs.run", values=values(dataset, stopped, pipeline_stages=2))) == {""}
    assert numbers(stopped) == numbers(straight)
    resumed, wanted = weights(stopped, 20), weights(straight, 20)
    assert set(resumed) == set(wanted) and all(torch.equal(resumed[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_checkpoint_of_two_stages_continues_on_others(
    workers: Workers, dataset: Path, straight: Path, stopped: Path, stages: int
) -> None:
    group = workers(stages)
    assert set(group.run("support.runs.run", values=values(dataset, stopped, pipeline_stages=stages))) == {""}
    resumed, wanted = numbers(stopped), numbers(straight)
    assert [record["step"] for record in resumed] == [record["step"] for record in wanted]
    for one, other in zip(resumed, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    (first,) = (record for record in resumed if record["step"] == 11)
    (same,) = (record for record in wanted if record["step"] == 11)
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-5)


def test_more_replicas_with_zero_continue_it(workers: Workers, dataset: Path, straight: Path, stopped: Path) -> None:
    changed = values(dataset, stopped, pipeline_stages=2, zero_stage=1)
    assert set(workers(4).run("support.runs.run", values=changed)) == {""}
    for one, other in zip(numbers(stopped), numbers(straight), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_resume_is_bit_for_bit_with_sharded_master_weights(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """bf16 and ZeRO 1, as in the paper's configurations: loading publishes weights from the master weights."""
    directories = [tmp_path / "straight", tmp_path / "stopped"]
    for directory in directories:
        settings = {**values(dataset, directory, pipeline_stages=2, zero_stage=1), "precision": "bf16"}
        assert set(workers(4).run("support.runs.run", values=settings)) == {""}
        if directory.name == "stopped":
            shutil.rmtree(directory / "checkpoints/global_step20")
            assert set(workers(4).run("support.runs.run", values=settings)) == {""}
    straight, stopped = directories
    assert numbers(stopped) == numbers(straight)
    resumed, wanted = weights(stopped, 20), weights(straight, 20)
    assert set(resumed) == set(wanted) and all(torch.equal(resumed[name], wanted[name]) for name in wanted)


def test_a_finished_run_is_only_validated_again(
    workers: Workers, dataset: Path, straight: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    assert set(workers(2).run("support.runs.run", values=values(dataset, directory, pipeline_stages=2))) == {""}
    assert numbers(directory) == numbers(straight)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing file", "missing manifest", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    workers: Workers, dataset: Path, straight: Path, tmp_path: Path, damage: str
) -> None:
    """The newest checkpoint is damaged: the run resumes from the one before and ends the same."""
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    folder = directory / "checkpoints/global_step20"
    file = folder / "stage001-replica000.pt"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing file":
        file.unlink()
    elif damage == "missing manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert set(workers(2).run("support.runs.run", values=values(dataset, directory, pipeline_stages=2))) == {""}
    assert numbers(directory) == numbers(straight)
    resumed, wanted = weights(directory, 20), weights(straight, 20)
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)


def test_mistakes_of_the_user_are_one_line_on_all_ranks(
    workers: Workers, dataset: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    def line(changes: dict[str, dict[str, Any]], directory: Path = tmp_path / "new") -> str:
        settings = values(dataset, directory, pipeline_stages=2)
        for section, keys in changes.items():
            settings[section] = {**settings[section], **keys}
        lines = workers(2).run("support.runs.run", values=settings)
        assert len(set(lines)) == 1 and "\n" not in lines[0]
        return str(lines[0])

    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    log = before.pop(stopped / "console.log")
    assert "is of another run (model.intermediate_size: 24 there, 32 here)" in line(
        {"model": {"intermediate_size": 32}}, stopped
    )
    assert "data.seed: 0 there, 5 here" in line({"data": {"seed": 5}}, stopped)
    after = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    logged = after.pop(stopped / "console.log")
    assert after == before and logged.startswith(log), "only the log grows: it keeps why a start was refused"
    manifest_file = stopped / "checkpoints/global_step10/manifest.json"
    manifest = {**json.loads(manifest_file.read_text()), "num_samples": 7}
    manifest_file.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    assert "is of another run (training samples: 7 there, " in line({}, stopped), "the order would be another one"
    for folder in (stopped / "checkpoints").glob("global_step*"):
        (folder / "manifest.json").unlink()
    assert "no whole checkpoint in" in line({}, stopped)
    assert "model.vocab_size=300 is smaller than the 320 pieces" in line({"model": {"vocab_size": 300}})
    assert str(tmp_path / "none") in line({"data": {"path": str(tmp_path / "none")}})
    assert "train.evaluation_samples=100000" in line({"train": {"evaluation_samples": 100000}})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert "File exists; give a folder that can be written" in line({}, tmp_path / "file")
    assert "Not a directory; give a folder that can be written" in line({}, tmp_path / "file/below")
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    (broken / "dataset.json").write_text('{"format": "lime_dist dataset 1", "splits": {"train": {}}}')
    assert "dataset.json lacks what a dataset needs" in line({"data": {"path": str(broken)}})
