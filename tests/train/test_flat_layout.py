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
from lime_dist.model.optimizer_states import optimizer_states, updated_whole
from lime_dist.pipeline.flat_layout import FlatLayout, lay_out
from lime_dist.pipeline.optimizer_memory import exchange_of, optimizer_bytes

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


def check_layout(layout: FlatLayout, shapes: dict[str, tuple[int, ...]], itemsize: int, piece: int) -> None:
    """Parameters are aligned and lie apart, pieces are even, and replicas update every element of every parameter once."""
    end = 0
    for name, place in layout.places.items():
        assert place.begin * itemsize % 128 == 0 and end <= place.begin
        assert place.end - place.begin == torch.Size(shapes[name]).numel()
        end = place.stop
    assert [each.start for each in layout.pieces] == [0, *(each.stop for each in layout.pieces[:-1])]
    assert end <= layout.size and all(len(each) * itemsize % (128 * layout.owners) == 0 for each in layout.pieces)
    covered = dict.fromkeys(shapes, 0)
    for owner in range(layout.owners):
        owned = layout.owned(owner)
        for number, run in layout.runs(owner):
            assert run.elements.start >= owned[number].start and run.elements.stop <= owned[number].stop
            for name, part in run.parts.items():
                place = layout.places[name]
                assert (run.group, run.states) == (place.group, place.states) and part
                assert place.begin <= part.start and part.stop <= place.end
                covered[name] += len(part)
    assert layout.state_elements() == [
        sum(len(run.elements) * len(run.states) for _, run in layout.runs(owner)) for owner in range(layout.owners)
    ]
    assert covered == {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert all(layout.keepers[name] in layout.holders[name] for name in shapes)


@pytest.mark.parametrize("precision", ITEM_BYTES)
@pytest.mark.parametrize("config", [*CASES, *map(load_config, CONFIGS)])
def test_parameters_and_slices_are_aligned(config: Config, precision: str) -> None:
    """Of every architecture and every configuration, whole on one stage and shared by 1, 2 and 8 replicas. Plans count the padding."""
    config = config.model_copy(update={"precision": precision})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 1})})
    shapes, itemsize = parameter_shapes(config), ITEM_BYTES[precision]
    groups = {name: architecture_of(config.model).parameter_group(name) for name in shapes}
    kept = optimizer_states(config, shapes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    for replicas in (1, 2, 8):
        piece = max(1, total // 3)
        layout = lay_out(shapes, groups, kept, itemsize, replicas, piece_elements=piece)
        check_layout(layout, shapes, itemsize, piece)
        lengths = [len(each) for each in layout.pieces]
        assert len(lengths) in (3, 4) and max(lengths) - lengths[0] == 0
        weights, others = optimizer_bytes(config, layout)
        assert weights == layout.size * itemsize
        accumulation = max(4, itemsize)
        states, masters = max(layout.state_elements()), layout.size // replicas * (itemsize < 4)
        assert states <= 2 * layout.size // replicas, "AdamW's two moments"
        assert others == (layout.size + states + masters) * accumulation


def test_tied_shared_and_whole_parameters() -> None:
    """Two stages cut a tied weight alike, wherever it lies on them; matrices that need it are whole, and what stages share belongs
    to replica 0."""
    own = {f"matrix {number}": (5 + number, 16) for number in range(7)} | {"norm": (16,)}
    tied, shared = {"embedding": (31, 16)}, {"router": (3, 2)}
    layouts = []
    for shapes in ({**tied, **own, **shared}, {**own, **shared, "more": (100, 16), **tied}):
        layout = lay_out(
            shapes, dict.fromkeys(shapes, "plain"), {name: ("moment",) for name in shapes}, 4, owners=3, tied=tied.keys(),
            shared=shared.keys(), whole={name for name in shapes if name.startswith("matrix")}, piece_elements=200,
        )  # fmt: skip
        check_layout(layout, shapes, 4, 200)
        assert all(len(layout.holders[f"matrix {number}"]) == 1 for number in range(7))
        assert {layout.keepers[f"matrix {number}"] for number in range(7)} == {0, 1, 2}
        assert layout.holders["router"] == [0] and layout.holders["embedding"] == [0, 1, 2]
        begin = layout.places["embedding"].begin
        layouts.append(
            [
                range(part.start - begin, part.stop - begin)
                for owner in range(3)
                for _, run in layout.runs(owner)
                if (part := run.parts.get("embedding"))
            ]
        )
    assert layouts[0] == layouts[1] and len(layouts[0]) > 3


def test_muon_keeps_matrices_whole() -> None:
    config = load_config(None, ["optimizer.name=muon", "parallel.zero_stage=1"])
    shapes = parameter_shapes(config)
    whole = updated_whole(config, shapes)
    assert whole == {name for name, states in optimizer_states(config, shapes).items() if states == ("momentum",)}
    assert updated_whole(load_config(None), shapes) == frozenset()


def test_more_replicas_than_elements() -> None:
    """With ZeRO 1 a replica may update nothing."""
    layout = lay_out({"norm": (3,)}, {"norm": "plain"}, {"norm": ("exp_avg",)}, 4, owners=4)
    assert layout.owned(1) == [range(32, 64)] and layout.size == 128
    assert [len(list(layout.runs(owner))) for owner in range(4)] == [1, 0, 0, 0]


def test_parameters_with_the_same_states_lie_together() -> None:
    """By group, then by states, then in the given order. Those whose gradients backward passes finish last lie first."""
    groups = {"a": "matrices", "b": "plain", "c": "matrices", "d": "matrices"}
    states = {"a": ("momentum",), "b": ("moment",), "c": ("moment",), "d": ("momentum",)}
    layout = lay_out(dict.fromkeys(groups, (2, 3)), groups, states, 8)  # type: ignore[arg-type]  # groups of the test
    assert [(name, place.begin, place.end) for name, place in layout.places.items()] == [
        ("b", 0, 6), ("c", 16, 22), ("a", 32, 38), ("d", 48, 54),
    ]  # fmt: skip


def test_what_replicas_exchange() -> None:
    """By hand: 256 elements with their padding, bf16 weights and float32 gradients. A slice has a multiple of 64 elements."""
    config = load_config(None, ["precision=bf16"])
    shapes, groups, states = {"a": (100,), "b": (70,)}, {"a": "plain", "b": "plain"}, {"a": ("m",), "b": ("m",)}
    layout = lay_out(shapes, groups, states, 2, piece_elements=150)  # type: ignore[arg-type]  # groups of the test
    assert layout.size == 256 and len(layout.pieces) == 2
    summed = exchange_of(config, layout, 4)
    assert (summed.calls, summed.gradient_bytes, summed.weight_bytes, summed.sent) == (2, 1024, 0, 2 * 1024 * 3 // 4)
    assert summed.late_bytes == 4 * len(layout.pieces[0]) < 1024
    layout = lay_out(shapes, groups, states, 2, owners=4, piece_elements=150)  # type: ignore[arg-type]  # groups of the test
    assert layout.size == 256 and len(layout.pieces) == 1
    scattered = exchange_of(config, layout, 4)
    assert (scattered.calls, scattered.gradient_bytes, scattered.weight_bytes) == (2, 1024, 512)
    assert scattered.sent == 1536 * 3 // 4
    assert exchange_of(config, layout, 1).calls == 0


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
