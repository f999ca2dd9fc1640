"""Protects stage cuts: as good as brute force, by compute and by memory; whole chunks; cuts by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.model import cost
from lime_dist.model.parameters import layer_parameters
from lime_dist.pipeline.partition import (
    EARLY,
    TOLERANCE,
    balance,
    compute_costs,
    memory_costs,
    range_sums,
    stage_bounds,
)
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.pipeline.shared_weights import boundary_prices, later_parameters


def every_cut(count: int, parts: int) -> Iterator[list[int]]:
    for inner in combinations(range(1, count), parts - 1):
        yield [0, *inner, count]


def assert_is_best(
    bounds: list[int],
    parts: int,
    cost_of: Callable[[int, int, int], float],
    penalty_of: Callable[[int], float],
    tolerance: float,
) -> None:
    """Compare with all cuts: of those within the tolerance the least penalties, and of those the cheapest.

    Args:
        cost_of: cost of a part, given its index, begin and end.
        penalty_of: penalty of a boundary.
    """

    def worst(bounds: list[int]) -> float:
        return max(cost_of(part, a, b) for part, (a, b) in enumerate(pairwise(bounds)))

    def order(bounds: list[int]) -> tuple[float, float]:
        return sum(map(penalty_of, bounds[1:-1])), worst(bounds)

    every = list(every_cut(bounds[-1], parts))
    limit = min(map(worst, every)) * (1 + tolerance)
    assert bounds in every and order(bounds) == min(order(cut) for cut in every if worst(cut) <= limit)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
def test_balance_equals_brute_force(tolerance: float) -> None:
    generator = random.Random(0)
    for _ in range(200):
        costs = [generator.randint(1, 20) for _ in range(generator.randint(1, 9))]
        penalties = [generator.randint(0, 3) for _ in range(len(costs) + 1)]
        parts = generator.randint(1, len(costs))
        bounds = balance(lambda part, costs=costs: range_sums(costs), parts, penalties, tolerance)
        assert_is_best(bounds, parts, lambda part, a, b, costs=costs: sum(costs[a:b]), penalties.__getitem__, tolerance)


def test_balance_of_parts_that_cost_differently_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(1, 9))
        parts = int(generator.integers(1, count + 1))
        costs = generator.integers(1, 20, (parts, count + 1, count + 1)).astype(float)
        costs[:, np.tri(count + 1, dtype=bool)] = np.inf
        penalties = generator.integers(0, 3, count + 1).tolist()
        bounds = balance(costs.__getitem__, parts, penalties, 0.3)
        assert_is_best(bounds, parts, lambda *where, costs=costs: costs[where], penalties.__getitem__, 0.3)


# -- models ---------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama": ["model.architecture=llama"],
    "hyper": ["model.architecture=hyper"],
    "value residual": ["model.architecture=value_residual"],
    "attention residuals": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=3"],
    "moda": ["model.lime={depth_attention: moda, mlp_entries: true}", "model.num_key_value_heads=2"],
    "kv": ["model.num_key_value_heads=2"],
    "kv, two rows, first boundary in a chunk": [
        "model.num_key_value_heads=4",
        "model.lime.history={policy: chunked, chunk_size: 4, rank: 2, first: 0}",
    ],
    "kv, chunked": ["model.lime.history={policy: chunked, chunk_size: 3, rank: 1, first: 2}"],
    "hidden, chunked": [
        "model.lime={routes: hidden, history: {policy: chunked, chunk_size: 3, rank: 2, first: 1}}",
        "parallel.activation_checkpointing=true",
    ],
    "hidden, dynamic": ["model.lime={routes: hidden, router: dynamic}", "model.tie_word_embeddings=false"],
}
LAYERS, TRAINING = 9, ["train.global_batch_size=10", "data.sequence_length=16", "model.vocab_size=600"]


def config_of(model: str, *more: str) -> Config:
    return load_config(None, [*MODELS[model], f"model.num_hidden_layers={LAYERS}", *TRAINING, *more])


def inside_a_chunk(config: Config) -> Callable[[int], int]:
    """1 for a boundary within a chunk. The last chunk has no summary, so its end is no better than other boundaries."""
    history = config.model.lime.history
    whole = (LAYERS - 1) // history.chunk_size * history.chunk_size if history.chunk_size else 0
    good = range(history.chunk_size, whole + 1, history.chunk_size) if history.chunk_size else range(LAYERS)
    return lambda boundary: int(boundary not in good)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_cut_by_compute(model: str, stages: int) -> None:
    config = config_of(model, f"parallel.pipeline_stages={stages}")
    prices = boundary_prices(config)
    flops = [layer.both for layer in cost.layer_flops(config.model, config.data.sequence_length, prices=prices)]
    flops[-1] += cost.head_flops(config.model).both
    assert_is_best(
        stage_bounds(config),
        stages,
        lambda stage, a, b: sum(flops[a:b]) * (1 + EARLY * (1 - stage / stages)),
        inside_a_chunk(config),
        TOLERANCE,
    )


def padded(elements: int, size: int) -> int:
    """Elements up to where the next parameter begins: a multiple of 128 bytes of weights."""
    return math.ceil(elements * size / 128) * 128 // size


def stage_bytes(config: Config, in_flight: int, stages: int, stage: int, begin: int, end: int) -> int:
    """Memory of a stage, term by term."""
    model, layers = config.model, range(begin, end)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    size, parameter = {"fp32": (4, 16), "bf16": (2, 18)}[config.precision]
    checkpointing = config.parallel.activation_checkpointing
    kept = sum(cost.activation_bytes(model, layer, tokens, size, checkpointing) for layer in layers)
    parameters = sum(padded(count, size) for layer in layers for count in layer_parameters(model, layer).values())
    embedding = padded(model.vocab_size * model.hidden_size, size)
    has_embedding = stage == 0
    if stage == 0:
        kept += cost.embedding_activation_bytes(tokens)
    else:
        kept += cost.received_activation_bytes(model, begin, tokens, size, checkpointing)
    if stage == stages - 1:
        kept += cost.head_activation_bytes(model, tokens, size)
        parameters += padded(model.hidden_size, size) + (0 if model.tie_word_embeddings else embedding)
        has_embedding = has_embedding or model.tie_word_embeddings
    parameters += embedding if has_embedding else 0
    prices = boundary_prices(config)
    parameters += sum(padded(count, size) for count in later_parameters(model, layers, prices).values())
    history, gradients = cost.history_bytes(model, layers, tokens, size, prices), 0
    depth = model.architecture == "attention_residuals" or model.lime.depth_attention == "moda"
    if depth or (model.architecture == "lime" and model.lime.routes == "hidden"):
        gradients = history * 4 // (4 + size)
    landing = 0
    if stage > 0:  # one more payload in transfer; it may land in its history
        lands = depth or (model.architecture == "lime" and model.lime.routes == "kv")
        landing = history - gradients if lands else cost.payload_bytes(model, begin, tokens, size, prices)
    here, state = in_flight, 0
    if config.parallel.offload_history and (depth or model.architecture == "lime"):
        here = min(in_flight, 3)
        if stage > 0 and (depth or model.lime.routes == "kv"):
            state = tokens * model.hidden_size * size  # received into the memory of the history
    histories = here * (history - gradients) - (in_flight - here) * state
    return in_flight * kept + histories + gradients + landing + parameter * parameters


@pytest.mark.parametrize(("stages", "offloads"), [(1, False), (2, False), (4, False), (4, True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_cut_by_memory(model: str, precision: str, stages: int, offloads: bool) -> None:
    more = [f"precision={precision}", f"parallel.pipeline_stages={stages}", "parallel.balance=memory"]
    more.append(f"parallel.offload_history={str(offloads).lower()}")
    config = config_of(model, *more)
    costs = memory_costs(config)
    in_flight = [OneForwardOneBackward(5, stages, 1).micro_batches_in_flight(stage) for stage in range(stages)]

    @cache
    def cost_of(stage: int, begin: int, end: int) -> int:
        return stage_bytes(config, in_flight[stage], stages, stage, begin, end)

    for stage in range(stages):
        for begin in range(1 if stage else 0, LAYERS if stage else 1):
            assert costs(stage)[begin, begin + 1] == cost_of(stage, begin, begin + 1)
            assert costs(stage)[begin, LAYERS] == cost_of(stage, begin, LAYERS)
    bounds = stage_bounds(config)
    assert_is_best(bounds, stages, cost_of, inside_a_chunk(config), 0.0)


def costliest(config: Config, bounds: list[int]) -> float:
    costs = compute_costs(config)
    return max(float(costs[begin, end]) for begin, end in pairwise(bounds))


def test_cuts_move_with_the_mixing() -> None:
    """Where partial mixtures begin, in the middle of a full history, one layer mixes for all later ones. With narrow layers and many
    heads that is much: its stage gets fewer layers, and each form of boundary has a cut that would be bad for the other."""
    shape = ["model.num_hidden_layers=64", "model.hidden_size=256", "model.intermediate_size=1024", "model.num_attention_heads=8",
             "data.sequence_length=256", "model.vocab_size=1024", "parallel.pipeline_stages=8", "model.lime.history={policy: full}"]  # fmt: skip
    minimal, entries = (load_config(None, [*shape, f"pipeline.boundary={form}"]) for form in ("minimal", "entries"))
    of_minimal, of_entries = stage_bounds(minimal), stage_bounds(entries)
    turning = next(stage for stage in range(8) if of_minimal[stage + 1] > 32)
    assert layers_of(minimal)[turning] == min(layers_of(minimal)) < min(layers_of(entries))
    assert layers_of(minimal)[-1] > layers_of(entries)[-1], "what it reads has been mixed before"
    assert costliest(minimal, of_minimal) < 0.8 * costliest(minimal, of_entries)
    assert costliest(entries, of_entries) < 0.9 * costliest(entries, of_minimal)


def layers_of(config: Config) -> list[int]:
    return [b - a for a, b in pairwise(stage_bounds(config))]


def test_early_stages_get_fewer_layers_by_memory() -> None:
    """They hold more micro-batches in flight."""
    shape = ["model.num_hidden_layers=16", "parallel.pipeline_stages=4", "train.global_batch_size=32"]
    by_compute, by_memory = (
        layers_of(load_config(None, [*shape, f"parallel.balance={b}"])) for b in ("compute", "memory")
    )
    assert by_memory[0] < by_compute[0] and by_memory == sorted(by_memory)


def test_the_stock_schedule_has_no_extra_micro_batches_in_flight() -> None:
    shape = ["parallel.pipeline_stages=4", "train.global_batch_size=32"]
    stock = memory_costs(load_config(None, [*shape, "pipeline.engine=stock"]))
    overlap = memory_costs(load_config(None, [*shape, "pipeline.extra_in_flight=0"]))
    more = memory_costs(load_config(None, [*shape, "pipeline.extra_in_flight=2"]))
    assert stock(0)[0, 5] == overlap(0)[0, 5] < more(0)[0, 5]
    assert stock(1)[2, 5] < overlap(1)[2, 5] < more(1)[2, 5], "and it posts no receives ahead"


@pytest.mark.parametrize(("stages", "best"), [(2, [0, 9, 16]), (4, [0, 5, 9, 13, 16])])
def test_chunks_stay_whole(stages: int, best: list[int]) -> None:
    """The output projection costs slightly more than a layer, so the best cut gives the last stage one layer less."""
    chunked = "model.lime.history={policy: chunked, chunk_size: 4, rank: 1, first: 0}"
    shape = ["model.num_hidden_layers=16", "model.vocab_size=2500", f"parallel.pipeline_stages={stages}", chunked]
    config = load_config(None, shape)
    costs = compute_costs(config)
    assert balance(lambda stage: costs, stages, [0] * 17, 0.0) == best
    assert stage_bounds(config) == list(range(0, 17, 16 // stages))


def test_the_stage_with_the_head_gets_fewer_layers() -> None:
    config = load_config(None, ["model.vocab_size=50000", "model.num_hidden_layers=16", "parallel.pipeline_stages=2"])
    first, second = (b - a for a, b in pairwise(stage_bounds(config)))
    assert first > second >= 1


@pytest.mark.parametrize("criterion", ["compute", "memory"])
def test_cuts_by_hand(criterion: str) -> None:
    by_hand = ["parallel.pipeline_stages=3", "parallel.stage_layers=[1,12,3]", f"parallel.balance={criterion}"]
    assert stage_bounds(load_config(None, by_hand)) == [0, 1, 13, 16]
