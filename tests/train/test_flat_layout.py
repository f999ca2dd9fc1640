"""Protects where parameters lie in the flat buffers: aligned for matrix products and collectives, with padding that stays zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import MODELS, small
from support.workers import WorkerGroup

from lime_dist.config.load import load_config, make_config
from lime_dist.config.precision import ITEM_BYTES
from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.decoder import decoder_layers
from lime_dist.model.optimizer_states import optimizer_states
from lime_dist.pipeline.optimizer_memory import optimizer_bytes
from lime_dist.train.flat_layout import owner_ranges, place_parameters

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
CASES = [
    make_config({"model": small(**changes).model_dump(exclude_none=True)}, name) for name, changes in MODELS.items()
]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in decoder_layers(config.model):
        with torch.device("meta"):
            module = spec.make()
        names = spec.exported_names(module)
        shapes |= {names[local]: tuple(parameter.shape) for local, parameter in module.named_parameters()}
    return shapes


@pytest.mark.parametrize("precision", ITEM_BYTES)
@pytest.mark.parametrize("config", [*CASES, *map(load_config, CONFIGS)])
def test_parameters_and_parts_are_aligned(config: Config, precision: str) -> None:
    """Of every architecture and every configuration, whole on one stage and shared by 1, 2 and 8 replicas. Plans count the padding."""
    config = config.model_copy(update={"precision": precision})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 1})})
    shapes, itemsize = parameter_shapes(config), ITEM_BYTES[precision]
    groups = {name: architecture_of(config.model).parameter_group(name) for name in shapes}
    states = optimizer_states(config, shapes)
    for replicas in (1, 2, 8):
        places = place_parameters(shapes, groups, states, replicas, frozenset(), itemsize)
        ranges = owner_ranges(places, replicas)
        end = 0
        for name, place in places.items():
            assert place.begin * itemsize % 128 == 0 and end <= place.begin
            assert place.end - place.begin == torch.Size(shapes[name]).numel()
            begin, end = ranges[place.owner]
            assert begin <= place.begin and place.end <= place.stop <= end
            end = place.stop
        assert all(number * itemsize % 128 == 0 for part in ranges for number in part)
        assert [begin for begin, _ in ranges[1:]] == [end for _, end in ranges[:-1]]

        sizes = {name: place.end - place.begin for name, place in places.items()}
        weights, others = optimizer_bytes(config, sizes, frozenset(), replicas)
        assert weights == ranges[-1][1] * itemsize
        shared = 2 + (itemsize < 4)  # AdamW's two moments, and the master weights
        accumulation = max(4, itemsize)
        assert others == (ranges[-1][1] + shared * max(end - begin for begin, end in ranges)) * accumulation


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_padding_stays_zero(workers: Callable[[int], WorkerGroup], zero_stage: int) -> None:
    """Hyper-Connections have parameters of every odd size."""
    values = {
        "model": {**MODELS["hyper dynamic"], "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
                  "num_attention_heads": 6},
        "data": {"sequence_length": 4}, "train": {"global_batch_size": 4}, "precision": "bf16",
        "parallel": {"zero_stage": zero_stage}, "optimizer": {"warmup_steps": 0, "weight_decay": 0.5},
    }  # fmt: skip
    for result in workers(2).run("support.memory.padding_of_stage", values=values, steps=2):
        assert result["padding"] > 100 and result["not zero"] == 0 and result["misplaced"] == 0
