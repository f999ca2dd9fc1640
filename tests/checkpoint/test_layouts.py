"""Tests that checkpoints do not depend on the layout: every model resumes with other stages, widths, batch splits, precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import numbers, records, values
from support.workers import WorkerGroup

Workers = Callable[[int], WorkerGroup]
STEPS = 8

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama, untied": {"architecture": "llama", "tie_word_embeddings": False},
    "keys and values, untied": {"tie_word_embeddings": False},
    "keys and values, chunked": {"lime": {"history": {"policy": "chunked", "chunk_size": 2, "first": 1}}},
    "hidden states, static": {"num_key_value_heads": None, "lime": {"routes": "hidden", "top_p": 0.9}},
    "hidden states, dynamic, untied": {
        "num_key_value_heads": None, "lime": {"routes": "hidden", "router": "dynamic"}, "tie_word_embeddings": False,
    },
    "hyper": {"architecture": "hyper", "hyper": {"rate": 2}},
    "value residual": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "moda": {"lime": {"depth_attention": "moda", "mlp_entries": True}},
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
}  # fmt: skip

Leg = tuple[int, dict[str, dict[str, Any]]]
"""Number of processes, and changes to sections of the configuration."""


def go(
    workers: Workers, dataset: Path, directory: Path, model: dict[str, Any], legs: list[Leg]
) -> list[dict[str, float]]:
    """Train one leg after the other, of equal length, each started by the same command. Returns the records."""
    share = STEPS // len(legs)
    for index, (size, sections) in enumerate(legs):
        settings = values(dataset, directory, STEPS)
        settings["model"] |= model
        settings["train"] |= {"evaluation_samples": 0, "global_batch_size": 8}
        for section, keys in sections.items():
            settings[section] = {**settings.get(section, {}), **keys} if isinstance(keys, dict) else keys
        stop = {"do": "signal", "rank": 0, "step": share * (index + 1)}
        last = index == len(legs) - 1
        for error, _ in workers(size).run("support.runs.observe", values=settings, events=[] if last else [stop]):
            assert error == ""
        assert records(directory)[-1]["step"] == (STEPS if last else stop["step"])
    return numbers(directory)


def stages(count: int) -> Leg:
    return count, {"parallel": {"pipeline_stages": count}}


def assert_close(run_records: list[dict[str, float]], wanted: list[dict[str, float]], changes: list[int]) -> None:
    """Equal samples and learning rates; the first loss after a change within 1e-5, later ones within 1e-4."""
    for one, other in zip(run_records, wanted, strict=True):
        same = ("step", "consumed_samples", "tokens", "lr", "router_lr")
        assert [one[key] for key in same] == [other[key] for key in same]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5 if one["step"] - 1 in changes else 1e-4), one


@pytest.mark.parametrize("model", MODELS)
def test_stages_change_under_every_model(workers: Workers, dataset: Path, tmp_path: Path, model: str) -> None:
    """1, 2, 3, and again 1 stage, two steps each."""
    straight = go(workers, dataset, tmp_path / "straight", MODELS[model], [stages(1)])
    legs = [stages(1), stages(2), stages(3), stages(1)]
    assert_close(go(workers, dataset, tmp_path / "changed", MODELS[model], legs), straight, [2, 4, 6])


@pytest.mark.parametrize("model", ["full", "moda"])
def test_parts_change(workers: Workers, dataset: Path, tmp_path: Path, model: str) -> None:
    """Six layers on 2 stages × 3 parts, 1 stage, 3 stages × 2 parts, and 2 stages × 1 part."""
    layers = {**MODELS.get(model, {}), "num_hidden_layers": 6}
    interleaved = {"pipeline": {"schedule": "interleaved"}}
    legs: list[Leg] = [
        (2, {"parallel": {"pipeline_stages": 2, "virtual_stages": 3}, **interleaved}),
        stages(1),
        (3, {"parallel": {"pipeline_stages": 3, "virtual_stages": 2}, **interleaved}),
        stages(2),
    ]
    straight = go(workers, dataset, tmp_path / "straight", layers, [stages(1)])
    assert_close(go(workers, dataset, tmp_path / "changed", layers, legs), straight, [2, 4, 6])


def test_what_crosses_boundaries_changes(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """Partial mixtures and entries, over three stages; each continues from the other's checkpoint."""
    straight = go(workers, dataset, tmp_path / "straight", {}, [stages(1)])
    three = {"parallel": {"pipeline_stages": 3}}
    minimal, entries = ((3, {**three, "pipeline": {"boundary": form}}) for form in ("minimal", "entries"))
    run_records = go(workers, dataset, tmp_path / "changed", {}, [minimal, entries, minimal, stages(1)])
    assert_close(run_records, straight, [2, 4, 6])


def test_widths_and_batch_splits_change(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """One replica with 8 × 1 samples; two with 2 × 2; ZeRO 1 with 1 × 4; two stages of two replicas with 4 × 1."""
    straight = go(workers, dataset, tmp_path / "straight", {}, [stages(1)])
    legs: list[Leg] = [
        (1, {"train": {"micro_batch_size": 1}}),
        (2, {"train": {"micro_batch_size": 2}}),
        (2, {"train": {"micro_batch_size": 4}, "parallel": {"zero_stage": 1}}),
        (4, {"train": {"micro_batch_size": 1}, "parallel": {"zero_stage": 1, "pipeline_stages": 2}}),
    ]
    assert_close(go(workers, dataset, tmp_path / "changed", {}, legs), straight, [2, 4, 6])


def test_precisions_change(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """float32, bf16, float32. Weights in checkpoints are always float32. bf16 has 8 bits of precision: within 1e-2."""
    straight = go(workers, dataset, tmp_path / "straight", {}, [stages(1)])
    bf16 = (2, {"parallel": {"pipeline_stages": 2}, "precision": "bf16"})
    run_records = go(workers, dataset, tmp_path / "changed", {}, [stages(1), bf16, bf16, stages(1)])
    for one, other in zip(run_records, straight, strict=True):
        assert one["consumed_samples"] == other["consumed_samples"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_the_global_batch_changes(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """No sample is skipped or repeated when the batch size changes."""
    legs: list[Leg] = [(1, {}), (2, {"train": {"global_batch_size": 4}, "parallel": {"pipeline_stages": 2}})]
    run_records = go(workers, dataset, tmp_path / "changed", {}, legs)
    assert [record["consumed_samples"] for record in run_records] == [8, 16, 24, 32, 36, 40, 44, 48]


@pytest.mark.slow
def test_a_batch_that_grows_is_the_same_in_every_layout(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """Batches of 4, 8, 12, then 16: equal samples and losses in one process and in 2 × 2 with ZeRO 1. The first step equals
    that of a run with batches of 4."""
    ramp = {"train": {"global_batch_size": 16, "micro_batch_size": 2, "batch_ramp": RAMP}}
    straight = go(workers, dataset, tmp_path / "straight", {}, [(1, ramp)])
    assert [record["consumed_samples"] for record in straight] == [4, 8, 16, 28, 44, 60, 76, 92]
    legs: list[Leg] = [
        (1, ramp),
        (4, {**ramp, "parallel": {"zero_stage": 1, "pipeline_stages": 2}}),
        (2, {**ramp, "parallel": {"pipeline_stages": 2}}),
        (1, {"train": {**ramp["train"], "micro_batch_size": 4}}),
    ]
    assert_close(go(workers, dataset, tmp_path / "changed", {}, legs), straight, [2, 4, 6])
    fixed = go(workers, dataset, tmp_path / "fixed", {}, [(1, {"train": {"global_batch_size": 4}})])
    assert fixed[0]["loss"] == pytest.approx(straight[0]["loss"], rel=1e-6)
    assert fixed[2]["loss"] != pytest.approx(straight[2]["loss"], rel=1e-6)


RAMP = {"start": 4, "increment": 4, "samples": 24}
