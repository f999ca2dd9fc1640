"""Protects `activation_checkpointing: auto`: each stage computes again as little as its memory allows."""

from __future__ import annotations

from typing import Any

import pytest

from lime_dist import distributed, load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError
from lime_dist.pipeline.checkpointing_choice import USABLE, describe_checkpointing, stage_peaks, with_checkpointing
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.plan.forecast import Machine, forecast

MODEL = [
    "model.hidden_size=64", "model.intermediate_size=256", "model.num_attention_heads=4", "model.num_hidden_layers=8",
    "model.vocab_size=512", "data.sequence_length=128", "train.global_batch_size=16", "train.micro_batch_size=2",
    "parallel.pipeline_stages=4",
]  # fmt: skip


def auto(*overrides: str) -> Config:
    return load_config(None, [*MODEL, "parallel.activation_checkpointing=auto", *overrides])


def test_stages_compute_again_as_little_as_fits() -> None:
    """Early stages hold more micro-batches in flight. The plan counts what was chosen."""
    config = auto()
    kept, halves, layers = (stage_peaks(config, stage_bounds(config), each, 4) for each in (False, "selective", True))
    assert all(a > b > c for a, b, c in zip(kept[:3], halves[:3], layers[:3], strict=True))
    memory = (halves[0] - 1) / USABLE
    chosen = with_checkpointing(config, memory, 4)
    assert chosen.parallel.activation_checkpointing == [True, True, "selective", False]
    assert halves[1] >= halves[0] > halves[2] and kept[2] >= halves[0] > kept[3], "as these numbers demand"
    planned = forecast(config, Machine(1e12, 1e12, 1e9, 1e-5, memory), 4)
    assert [stage.memory.peak for stage in planned.stages] == [layers[0], layers[1], halves[2], kept[3]]
    assert [stage.checkpointing for stage in planned.stages] == chosen.parallel.activation_checkpointing
    line = describe_checkpointing(config, chosen, 2e9)
    assert line == (
        "parallel.activation_checkpointing=auto: true on stages 0 to 1, selective on stage 2, false on stage 3, for 85% of 2.0 GB a process"
    )


def test_too_little_memory_and_unknown_memory() -> None:
    config = auto()
    assert with_checkpointing(config, 1.0, 4).parallel.activation_checkpointing == [True] * 4
    unknown = with_checkpointing(config, None, 4)
    assert [unknown.parallel.checkpointing_of(stage) for stage in range(4)] == [False] * 4
    assert "the memory of the devices is unknown" in str(describe_checkpointing(config, unknown, None))
    by_hand = load_config(None, [*MODEL, "parallel.activation_checkpointing=selective"])
    assert with_checkpointing(by_hand, 1.0, 4) is by_hand
    assert describe_checkpointing(by_hand, by_hand, 1.0) is None


def test_the_cut_stays_the_one_for_which_it_was_chosen() -> None:
    """A cut by memory depends on what stages keep."""
    config = auto("parallel.balance=memory")
    memory = stage_peaks(config, stage_bounds(config), "selective", 4)[0] / USABLE
    chosen = with_checkpointing(config, memory, 4)
    assert chosen.parallel.activation_checkpointing != [False] * 4
    assert stage_bounds(chosen) == stage_bounds(config)


@pytest.mark.parametrize(
    "setting", ["sometimes", "3", "[true]", "[true,auto,false,false]", "null"], ids=lambda setting: setting
)
def test_mistakes(setting: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, [*MODEL, f"parallel.activation_checkpointing={setting}"])
    assert "parallel.activation_checkpointing=" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "least"),
    [
        ([("a gpu0", 90), ("a gpu1", 70), ("b gpu0", 80)], 70),
        ([("a gpu0", 90), ("a gpu0", 88), ("b gpu0", 80)], 44),
        ([("a gpu0", 90), None, ("b gpu0", 80)], None),
    ],
)
def test_free_memory(monkeypatch: pytest.MonkeyPatch, found: list[Any], least: int | None) -> None:
    """Of the process that has least; processes that share a device share its memory."""

    def gather(into: list[Any], own: Any) -> None:
        into[:] = found

    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: len(found))
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    assert distributed.free_memory() == least
