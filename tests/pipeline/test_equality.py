"""Protects the main guarantee: a pipeline computes what one process computes, for every cut into stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, combinations, product
from typing import Any

import pytest
import torch
import yaml
from support.models import NUMERICS
from support.policies import POLICIES
from support.wires import rounded_to_float8
from support.workers import WorkerGroup

from benchmarks.equality import train_one_process
from benchmarks.staged import staged_logits
from lime_dist.config.load import make_config
from lime_dist.config.schema import Checkpointing
from lime_dist.model.architecture import architecture_of
from lime_dist.pipeline.shared_weights import boundary_prices

STEPS = 5
EVALUATION_MICRO_BATCH_SIZE = 4
"""Differs from training: between training steps, payloads have another shape."""
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 5e-2}
"""Largest ‖Δ‖∞/‖g‖∞ per tensor of gradients and parameters. bf16 has 8 significant bits and rounds at every boundary."""
UPDATE_TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 1e-1}
"""The same for the total update of the float32 master weights, a difference of close numbers. A missing update gives 1."""


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "lime": {"architecture": "lime"},
    "hidden static": {"architecture": "lime", "lime": {"routes": "hidden"}},
    "hidden top_p": {"architecture": "lime", "lime": {"routes": "hidden", "top_p": 0.7, "start_layer": 2}},
    "hidden dynamic": {"architecture": "lime", "lime": {"routes": "hidden", "router": "dynamic"}},
    "moda": {"architecture": "lime", "lime": {"depth_attention": "moda"}},
    "moda, MLP, chunked": {
        "architecture": "lime",
        "lime": {
            "depth_attention": "moda",
            "mlp_entries": True,
            "history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1},
        },
    },
    "value residual": {"architecture": "value_residual"},
    "value residual, learnable": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
    "attention residuals, full": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 1}},
    "hyper static": {"architecture": "hyper", "hyper": {"rate": 2, "dynamic": False}},
    "hyper dynamic": {"architecture": "hyper", "hyper": {"rate": 3}},
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 3}},
    "hyper doubly stochastic": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic", "rate": 3}},
    "hyper permutations": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 3}},
}


ROUTES: dict[str, dict[str, Any]] = {
    "kv": {"routes": "kv"},
    "static": {"routes": "hidden"},
    "dynamic": {"routes": "hidden", "router": "dynamic", "start_layer": 2},
}


def policy_settings(routes: str, policy: str, precision: str, **parallel: Any) -> dict[str, Any]:
    """`settings` with 9 layers, so that stages cut chunks of 3 and 4 layers, and 8 micro-batches."""
    values = settings("lime", 2 if routes == "kv" else 4, True, precision, **parallel)
    lime = {**ROUTES[routes], "history": POLICIES[policy]}
    values["model"] = {**values["model"], "num_hidden_layers": 9, "lime": lime}
    values["train"] = {**values["train"], "micro_batch_size": 1}
    return values


def settings(model: str, heads: int, tied: bool, precision: str, **parallel: Any) -> dict[str, Any]:
    """Five layers (not divisible by any stage count used here), 4 micro-batches, and clipping in every step."""
    return {
        "model": {
            **MODELS[model], "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": heads, "tie_word_embeddings": tied,
        },
        "data": {"sequence_length": 7},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 10},
        "optimizer": {
            "warmup_steps": 2,
            "max_grad_norm": 0.05,
            # With ε far above the clipped gradients an update is about lr · g / ε. So wrong clipping shows, which AdamW's
            # normalisation would hide, and rounding errors of tiny gradients are not amplified.
            "lr": 0.01,
            "router_lr": 0.1,
            "eps": 0.01,
        },
        "parallel": parallel,
        "precision": precision,
    }  # fmt: skip


@cache
def reference(text: str, steps: int, evaluation: int) -> dict[str, Any]:
    return train_one_process(make_config(yaml.safe_load(text), "a test"), steps, evaluation)


def plain_reference(values: dict[str, Any], steps: int, evaluation: int) -> dict[str, Any]:
    """What one process computes for a run with any number of stages."""
    train = {**values["train"], "compile": False}
    return reference(yaml.safe_dump({**values, "parallel": {}, "pipeline": {}, "train": train}), steps, evaluation)


def check_equal(
    values: dict[str, Any],
    group: WorkerGroup,
    steps: int = STEPS,
    evaluation: int = EVALUATION_MICRO_BATCH_SIZE,
    as_precise_as: str = "",
    worker: str = "support.cases.train_steps",
    expected: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compare losses, validation, gradients, norms and parameters of every rank with one process, with the tolerance of the
    run's precision or of a lower one. Returns the results of the ranks.

    Args:
        worker: the function that the ranks run.
        expected: the result of one process, if it is not the plain decoder's.
    """
    results = group.run(worker, values=values, steps=steps, evaluation_micro_batch_size=evaluation)
    expected = expected or plain_reference(values, steps, evaluation)
    precision = as_precise_as or values["precision"]
    tolerance = TOLERANCE[precision]
    assert min(expected["norms"]) > values["optimizer"]["max_grad_norm"], (
        "every step must clip, otherwise clipping is not tested"
    )
    covered: set[str] = set()
    for result in results:
        assert result["leaked histories"] == 0
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance / 10)
        assert result["evaluations"] == pytest.approx(expected["evaluations"], rel=tolerance / 10)
        assert result["norms"] == pytest.approx(expected["norms"], rel=tolerance)
        for kind, tolerance in (
            ("gradients", TOLERANCE[precision]),
            ("parameters", TOLERANCE[precision]),
            ("updates", UPDATE_TOLERANCE[precision]),
        ):
            for name, actual in result[kind].items():
                wanted = expected[kind][name].double()
                error = (actual.double() - wanted).abs().max() / wanted.abs().max()
                assert error <= tolerance, f"{kind} of {name} on stage {result['stage']}: {error:.1e}"
        covered |= set(result["gradients"])
    assert covered == set(expected["gradients"]), "every parameter's gradient must be compared"
    for one, other in combinations(results, 2):
        for name in one["parameters"].keys() & other["parameters"].keys():
            assert torch.equal(one["parameters"][name], other["parameters"][name]), f"copies of {name} differ"
    return results


PLAIN_CASES = [
    (architecture, tied, heads, stages, precision)
    for architecture, tied, heads, stages in product(("llama", "lime"), (True, False), (4, 2), (1, 2, 3, 4))
    for precision in ("fp64", "fp32")
    if (stages + tied + heads // 2) % 2 == (architecture == "lime")
    if precision == "fp64" or tied == (stages > 2)
]
"""Architecture, tied weights, key/value heads, stages, precision: all triples of the first four in float64, all pairs of three in float32."""


def test_the_plain_cases_cover_every_triple() -> None:
    exact = [case[:4] for case in PLAIN_CASES if case[4] == "fp64"]
    for chosen in combinations(range(4), 3):
        assert len({tuple(case[i] for i in chosen) for case in exact}) == (8 if 3 not in chosen else 16), chosen
    single = [case for case in PLAIN_CASES if case[4] == "fp32"]
    assert {(case[0], case[3]) for case in single} == set(product(("llama", "lime"), (1, 2, 3, 4)))
    assert {case[1] for case in single} == {True, False} and {case[2] for case in single} == {2, 4}


@pytest.mark.parametrize(("architecture", "tied", "heads", "stages", "precision"), PLAIN_CASES)
def test_pipeline_equals_one_process(
    workers: Callable[[int], WorkerGroup], architecture: str, tied: bool, heads: int, stages: int, precision: str
) -> None:
    check_equal(settings(architecture, heads, tied, precision, pipeline_stages=stages), workers(stages))


@pytest.mark.parametrize("architecture", ["llama", "lime"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bf16_pipeline_equals_one_bf16_process(
    workers: Callable[[int], WorkerGroup], architecture: str, stages: int, tied: bool
) -> None:
    check_equal(settings(architecture, 2, tied, "bf16", pipeline_stages=stages), workers(stages))


@pytest.mark.parametrize("cut", [[1, 4], [4, 1], [2, 3]], ids=str)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_stage_without_a_router(workers: Callable[[int], WorkerGroup], cut: list[int], precision: str) -> None:
    """Layer 0 has no router: a stage that holds only it has an empty router group (where DeepSpeed's ZeRO-1 hangs)."""
    values = settings("lime", 2, True, precision, pipeline_stages=2, stage_layers=cut)
    values["pipeline"] = {"boundary": "entries"}  # partial mixtures would need copies of later routers
    results = check_equal(values, workers(2))
    assert [result["routers"] for result in results] == [cut[0] - 1, cut[1]]


@pytest.mark.parametrize(
    ("zero_stage", "tied", "precision"),
    [
        (0, True, "fp64"),
        (1, False, "fp64"),
        (0, False, "fp32"),
        (1, True, "fp32"),
        (0, True, "bf16"),
        (1, False, "bf16"),
    ],
)
def test_two_replicas_of_two_stages(
    workers: Callable[[int], WorkerGroup], zero_stage: int, tied: bool, precision: str
) -> None:
    """2 × 2 processes on the joined batch; the first stage has no router."""
    values = settings("lime", 2, tied, precision, pipeline_stages=2, zero_stage=zero_stage, stage_layers=[1, 4])
    check_equal(values, workers(4))


@pytest.mark.parametrize(
    ("topology", "order"), [("stages_together", [0, 1, 0, 1]), ("replicas_together", [0, 0, 1, 1])]
)
@pytest.mark.parametrize("engine", ["overlap", "stock"])
def test_either_order_of_ranks(
    workers: Callable[[int], WorkerGroup], topology: str, order: list[int], engine: str
) -> None:
    """Whether neighbouring ranks are stages of a replica or replicas of a stage changes only where they run."""
    values = settings("lime", 2, True, "fp64", pipeline_stages=2, zero_stage=1, topology=topology)
    values["pipeline"] = {"engine": engine}
    results = check_equal(values, workers(4))
    assert [result["stage"] for result in results] == order
    assert [(result["stage"], result["replica"]) for result in results] == sorted(
        ((stage, replica) for stage in range(2) for replica in range(2)),
        key=lambda place: place[::-1] if topology == "stages_together" else place,
    )


@pytest.mark.parametrize("topology", ["stages_together", "replicas_together"])
@pytest.mark.parametrize("policy", ["full", "first_last", "chunked"])
def test_everything_together(workers: Callable[[int], WorkerGroup], policy: str, topology: str) -> None:
    """2 stages × 2 replicas × ZeRO-1 × bf16 with float32 accumulation over micro-batches × activation checkpointing, as in the
    configurations for clusters. Two steps, since the effect of rounding grows from step to step."""
    values = policy_settings(
        "kv", policy, "bf16", pipeline_stages=2, zero_stage=1, activation_checkpointing=True, topology=topology
    )
    values["model"]["num_hidden_layers"] = 5
    check_equal(values, workers(4), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_of_a_tied_weight_stay_the_same_over_three_replicas(
    workers: Callable[[int], WorkerGroup], zero_stage: int, precision: str
) -> None:
    """The order in which three replicas are summed depends on a weight's position, which differs between the stages."""
    values = settings("lime", 2, True, precision, pipeline_stages=2, zero_stage=zero_stage)
    values["train"] = {**values["train"], "global_batch_size": 12}
    results = check_equal(values, workers(6))
    name = "model.embed_tokens.weight"
    copies = [result["parameters"][name] for result in results if name in result["parameters"]]
    assert len(copies) == 6 and all(torch.equal(copy, copies[0]) for copy in copies)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_128_layers_run_a_step(workers: Callable[[int], WorkerGroup], precision: str) -> None:
    values = settings("lime", 2, True, precision, pipeline_stages=2)
    values["model"] = {**values["model"], "num_hidden_layers": 128}
    for result in workers(2).run("support.cases.train_steps", values=values, steps=1):
        assert 0 < result["norms"][0] < float("inf") and result["losses"][0] < 10
        assert all(update.isfinite().all() and update.abs().max() > 0 for update in result["updates"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "tied", "precision"),
    [(0, False, "fp32"), (1, True, "fp32"), (0, True, "bf16"), (1, False, "bf16")],
)
def test_two_replicas_of_three_stages(
    workers: Callable[[int], WorkerGroup], zero_stage: int, tied: bool, precision: str
) -> None:
    values = settings("lime", 2, tied, precision, pipeline_stages=3, zero_stage=zero_stage, stage_layers=[1, 2, 2])
    check_equal(values, workers(6))


@pytest.mark.parametrize(
    ("model", "by_stage"),
    [(model, [[True, "selective"], ["selective", True]][turn % 2]) for turn, model in enumerate(MODELS)],
)
def test_activation_checkpointing_changes_nothing(
    workers: Callable[[int], WorkerGroup], model: str, by_stage: list[Checkpointing]
) -> None:
    """On two stages; `test_numerics` has one stage and three."""
    values = settings(model, 4, True, "fp64", pipeline_stages=2, activation_checkpointing=by_stage)
    check_equal(values, workers(2))


@pytest.mark.parametrize("model", list(MODELS)[2:])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_other_model(workers: Callable[[int], WorkerGroup], model: str, stages: int) -> None:
    """In float64; the next test has low precision."""
    check_equal(settings(model, 4, stages % 2 == 0, "fp64", pipeline_stages=stages), workers(stages))


@pytest.mark.parametrize("model", list(MODELS)[2:])
def test_every_other_model_in_bf16_with_two_replicas(workers: Callable[[int], WorkerGroup], model: str) -> None:
    """Three steps, since the effect of rounding grows from step to step."""
    check_equal(settings(model, 4, True, "bf16", pipeline_stages=2, zero_stage=1), workers(4), steps=3)


@pytest.mark.parametrize(
    ("model", "stages", "tied", "checkpointing"),
    [
        (model, 1 + turn % 3, turn % 2 == 0, (False, "selective", True, True)[turn % 4])
        for turn, model in enumerate(MODELS)
    ],
)
def test_numerics(
    workers: Callable[[int], WorkerGroup], model: str, stages: int, tied: bool, checkpointing: Checkpointing
) -> None:
    """Normed queries and keys, bounded and scaled logits, z-loss, scaled branches, and learning rates that follow the width."""
    values = settings(model, 4, tied, "fp64", pipeline_stages=stages, activation_checkpointing=checkpointing)
    values["model"]["numerics"] = {**NUMERICS, "base_hidden_size": 8, "base_num_hidden_layers": 2}
    values["train"]["z_loss"] = 0.05
    check_equal(values, workers(stages), steps=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numerics_in_low_precision_with_two_replicas(workers: Callable[[int], WorkerGroup], precision: str) -> None:
    """With documents that do not see each other; in float32 with weight gradients in passes of their own."""
    values = documents(settings("lime", 2, True, precision, pipeline_stages=2, zero_stage=1))
    if precision == "fp32":
        values["pipeline"] = {"schedule": "zero_bubble"}
    values["model"]["numerics"] = {**NUMERICS, "base_hidden_size": 8, "base_num_hidden_layers": 2}
    values["train"]["z_loss"] = 0.05
    check_equal(values, workers(4), steps=2)


SETTINGS: list[Checkpointing] = [False, True, "selective"]
DOCUMENT_CASES = [
    (model, 1 + turn % 4, "stock" if turn % 5 == 4 else "overlap", SETTINGS[turn // 2 % 3], turn % 3, 1 + turn % 2)
    for turn, model in enumerate([*MODELS, *MODELS])
]
"""Every model twice, with different stages: model, stages, engine, activation checkpointing, extra micro-batches in flight, samples per micro-batch."""


@pytest.mark.parametrize(("model", "stages", "engine", "checkpointing", "extra", "micro_batch_size"), DOCUMENT_CASES)
def test_documents_that_do_not_see_each_other(
    workers: Callable[[int], WorkerGroup],
    model: str,
    stages: int,
    engine: str,
    checkpointing: Checkpointing,
    extra: int,
    micro_batch_size: int,
) -> None:
    """Compared with one process that runs every document alone. A stage in the middle reads the tokens, too."""
    values = documents(settings(model, 4, True, "fp64", pipeline_stages=stages, activation_checkpointing=checkpointing))
    values["train"] = {**values["train"], "micro_batch_size": micro_batch_size}
    values["pipeline"] = {"engine": engine, "extra_in_flight": extra if engine == "overlap" else 0}
    check_equal(values, workers(stages), steps=1)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_documents_with_two_replicas(workers: Callable[[int], WorkerGroup], precision: str) -> None:
    values = documents(settings("lime", 2, True, precision, pipeline_stages=2, zero_stage=1))
    check_equal(values, workers(4), steps=2)


@pytest.mark.parametrize(("model", "schedule"), [("lime", "interleaved"), ("attention residuals", "zero_bubble")])
@pytest.mark.parametrize("stages", [2, 3])
def test_documents_with_other_schedules(
    workers: Callable[[int], WorkerGroup], model: str, schedule: str, stages: int
) -> None:
    """Passes of a micro-batch through several parts of a stage; and passes for weight gradients alone."""
    values = documents(settings(model, 4, stages == 2, "fp64", pipeline_stages=stages))
    if schedule == "interleaved":
        values["parallel"]["virtual_stages"] = 2
        values["model"]["num_hidden_layers"] = 7
    values["pipeline"] = {"schedule": schedule}
    check_equal(values, workers(stages), steps=2)


def documents(values: dict[str, Any]) -> dict[str, Any]:
    """The same with the document mask: a vocabulary of seven tokens, so that documents have seven tokens on average."""
    values["model"] = {**values["model"], "vocab_size": 7}
    values["data"] = {"sequence_length": 12, "document_mask": True}
    return values


CUTS = {1: [9], 2: [5, 4], 3: [2, 5, 2], 4: [1, 3, 3, 2]}
"""Layers per stage: boundaries inside chunks of 3 and of 4, a stage with a whole chunk, one without a router."""


POLICY_CASES = [
    (policy, routes, stages, turn % 2 == 1, turn % 3)
    for p, policy in enumerate(list(POLICIES)[1:])
    for r, routes in enumerate(ROUTES)
    for stages in CUTS
    for turn in [p + r + stages]
]
"""Policy, routes, stages, activation checkpointing, extra micro-batches in flight. The last two alternate."""


def test_the_policy_cases_cover_every_triple() -> None:
    """All triples of policy, routes, stages and checkpointing occur, and all pairs that include the extra micro-batches."""
    for count, factors in ((3, range(4)), (2, range(5))):
        for chosen in combinations(factors, count):
            covered = {tuple(case[i] for i in chosen) for case in POLICY_CASES}
            assert covered == set(product(*({case[i] for case in POLICY_CASES} for i in chosen))), chosen
    values = [len({case[i] for case in POLICY_CASES}) for i in range(5)]
    assert values == [len(POLICIES) - 1, len(ROUTES), len(CUTS), 2, 3]


@pytest.mark.parametrize(("policy", "routes", "stages", "checkpointing", "extra"), POLICY_CASES)
def test_every_policy(
    workers: Callable[[int], WorkerGroup], policy: str, routes: str, stages: int, checkpointing: bool, extra: int
) -> None:
    """Every policy with every route and stage count, with 8 micro-batches; the test above checks the other combinations."""
    values = policy_settings(
        routes,
        policy,
        "fp64",
        pipeline_stages=stages,
        activation_checkpointing=checkpointing,
        stage_layers=CUTS[stages],
    )
    values["pipeline"] = {"extra_in_flight": extra}
    check_equal(values, workers(stages), steps=3)


SCHEDULE_CASES = [
    *product(("kv",), (1, 2, 3, 4, 5, 8), (0, 1, 2), (2, 3, 4)),
    *(("static", count, (turn + stages) % 3, stages) for turn, count in enumerate((1, 3, 8)) for stages in (2, 3, 4)),
]
"""Routes, micro-batches, extra ones in flight, stages."""


@pytest.mark.parametrize(("routes", "micro_batches", "extra", "stages"), SCHEDULE_CASES)
def test_every_schedule(
    workers: Callable[[int], WorkerGroup], routes: str, micro_batches: int, extra: int, stages: int
) -> None:
    """Includes fewer micro-batches than stages."""
    values = policy_settings(routes, "chunked", "fp64", pipeline_stages=stages, stage_layers=CUTS[stages])
    values["train"] = {**values["train"], "global_batch_size": micro_batches}
    values["pipeline"] = {"extra_in_flight": extra}
    check_equal(values, workers(stages), steps=2, evaluation=1)


STOCK_CASES = [
    *((routes, policy, 2 + (p + r) % 2) for p, policy in enumerate(POLICIES) for r, routes in enumerate(ROUTES)),
    *((routes, "chunked", 1) for routes in ROUTES),
]
"""Routes, policy, stages: 2 and 3 alternate."""


@pytest.mark.parametrize(("routes", "policy", "stages"), STOCK_CASES)
def test_the_stock_engine(workers: Callable[[int], WorkerGroup], routes: str, policy: str, stages: int) -> None:
    """`test_payloads_in_bf16` runs it with the other number of stages."""
    values = policy_settings(routes, policy, "fp64", pipeline_stages=stages, stage_layers=CUTS[stages])
    values["pipeline"] = {"engine": "stock"}
    check_equal(values, workers(stages), steps=2)


@pytest.mark.parametrize(
    ("model", "stages", "checkpointing"),
    [
        ("moda, MLP, chunked", 3, True), ("value residual, learnable", 3, False), ("hyper doubly stochastic", 2, True),
        ("hyper permutations", 3, False), ("gated residual", 2, True), ("attention residuals", 3, True),
        ("attention residuals, full", 2, False),
    ],
)  # fmt: skip
def test_other_models_under_the_stock_engine(
    workers: Callable[[int], WorkerGroup], model: str, stages: int, checkpointing: bool
) -> None:
    values = settings(model, 2, True, "fp64", pipeline_stages=stages, activation_checkpointing=checkpointing)
    values["pipeline"] = {"engine": "stock"}
    check_equal(values, workers(stages), steps=2)


@pytest.mark.parametrize(
    ("routes", "policy", "stages"),
    [(routes, policy, 5 - stages) for routes, policy, stages in STOCK_CASES if stages > 1],
)
def test_payloads_in_bf16(workers: Callable[[int], WorkerGroup], routes: str, policy: str, stages: int) -> None:
    """Both engines round the same payloads: they are equal up to the order of sums, and close to one process, which rounds none."""
    losses, gradients = [], []
    for engine in ("overlap", "stock"):
        values = policy_settings(routes, policy, "fp64", pipeline_stages=stages, stage_layers=CUTS[stages])
        values["pipeline"] = {"engine": engine, "wire_dtype": "bf16"}
        results = check_equal(values, workers(stages), steps=2, as_precise_as="bf16")
        losses.append(results[0]["losses"] + results[0]["evaluations"])
        gradients.append({name: g for result in results for name, g in result["gradients"].items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-12 * gradient.abs().max(), name


FLOAT8_CASES = [
    (policy, routes, 2 + (p + r) % 3, p % 2 == r % 2, (p + 2 * r) % 3)
    for p, policy in enumerate(POLICIES)
    for r, routes in enumerate(ROUTES)
]
"""Policy, routes, stages, activation checkpointing, extra micro-batches in flight."""
FLOAT8_ERROR = 0.05
"""Bound of the `distance` between gradients with float8 entries and with none rounded. The largest of these cases is 0.032."""


@pytest.mark.parametrize(("policy", "routes", "stages", "checkpointing", "extra"), FLOAT8_CASES)
def test_entries_in_float8(
    workers: Callable[[int], WorkerGroup], policy: str, routes: str, stages: int, checkpointing: bool, extra: int
) -> None:
    """A pipeline computes exactly what one process does that rounds entries and their gradients in the same places, by arithmetic
    of its own, and about what one does that rounds none."""
    values = policy_settings(
        routes, policy, "fp64",
        pipeline_stages=stages, stage_layers=CUTS[stages], activation_checkpointing=checkpointing,
    )  # fmt: skip
    values["pipeline"] = {
        "wire_dtype": "fp8", "extra_in_flight": extra, "boundary": "minimal" if stages == 3 else "entries",
    }  # fmt: skip
    check_float8(values, workers(stages), CUTS[stages])


@pytest.mark.parametrize("model", ["value residual, learnable", "moda, MLP, chunked"])
def test_other_models_in_float8(workers: Callable[[int], WorkerGroup], model: str) -> None:
    values = settings(model, 2, True, "fp64", pipeline_stages=3, stage_layers=[1, 2, 2])
    values["pipeline"] = {"wire_dtype": "fp8"}
    check_float8(values, workers(3), [1, 2, 2])


def check_float8(values: dict[str, Any], group: WorkerGroup, layers: Sequence[int]) -> None:
    config = make_config(values, "a test")
    rounding = partial(rounded_to_float8, block=math.gcd(128, architecture_of(config.model).entry_width))
    logits = partial(
        staged_logits,
        bounds=[0, *accumulate(layers)],
        payload=(torch.clone, rounding, torch.clone),
        gradient=(torch.clone, rounding, torch.clone),
        prices=boundary_prices(config),
    )
    expected = train_one_process(config, 3, EVALUATION_MICRO_BATCH_SIZE, logits=logits)
    check_equal(values, group, steps=3, expected=expected)
    plain = plain_reference(values, 3, EVALUATION_MICRO_BATCH_SIZE)
    assert 0 < distance(expected["gradients"], plain["gradients"]) < FLOAT8_ERROR
    assert expected["losses"] == pytest.approx(plain["losses"], rel=1e-3)


def distance(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖Δ‖/‖g‖ over all gradients of a model."""
    flat, wanted = (torch.cat([each[name].flatten() for name in exact]) for each in (gradients, exact))
    return float((flat - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("policy", list(POLICIES)[1:])
def test_every_policy_in_low_precision_with_two_replicas(
    workers: Callable[[int], WorkerGroup], policy: str, routes: str
) -> None:
    """bf16: five layers, for the tolerance above; two steps, since the effect of rounding grows from step to step."""
    check_equal(policy_settings(routes, policy, "fp32", pipeline_stages=2, zero_stage=1), workers(4), steps=3)
    bf16 = policy_settings(routes, policy, "bf16", pipeline_stages=2, activation_checkpointing=True)
    bf16["model"]["num_hidden_layers"] = 5
    check_equal(bf16, workers(2), steps=2)
