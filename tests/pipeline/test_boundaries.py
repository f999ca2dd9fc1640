"""Protects what every message says of a stage boundary: what crosses it, counted, in one form of words."""

from __future__ import annotations

import pytest

from lime_dist import load_config
from lime_dist.model.cost import payload_bytes
from lime_dist.pipeline.boundaries import describe_boundaries, stage_boundaries
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.shared_weights import boundary_prices

SHAPE = ["model.num_hidden_layers=16", "parallel.pipeline_stages=4", "parallel.stage_layers=[4,4,4,4]", "model.hidden_size=64",
         "model.num_attention_heads=2", "data.sequence_length=10", "train.micro_batch_size=1"]  # fmt: skip
HIDDEN, ENTRY = 64 * 4 * 10, 2 * 64 * 4 * 10


def kilobytes(nbytes: int) -> str:
    return f"{nbytes / 1e3:,.2f} kB a micro-batch: hidden state"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["parallel.pipeline_stages=1", "parallel.stage_layers=null"], []),
        (["model.architecture=llama"], [f"from each stage to the next, 0 to 3: {kilobytes(HIDDEN)}"]),
        (
            ["model.lime.history={policy: full}"],
            [
                f"stage 0 to 1: {kilobytes(HIDDEN + 4 * ENTRY)} + 4 slots",
                f"stage 1 to 2: {kilobytes(HIDDEN + 8 * ENTRY)} + 8 slots",
                f"stage 2 to 3: {kilobytes(HIDDEN + 4 * ENTRY)} + 4 partial mixtures",
            ],
        ),
        (
            ["model.lime.history={policy: full}", "pipeline.boundary=entries", "parallel.pipeline_stages=2", "parallel.stage_layers=[1,15]"],
            [f"stage 0 to 1: {kilobytes(HIDDEN + ENTRY)} + 1 slot"],
        ),
        (
            ["model.lime.history={policy: chunked, chunk_size: 3, rank: 2, first: 0}", "pipeline.boundary=entries"],
            [
                f"stage 0 to 1: {kilobytes(HIDDEN + 3 * ENTRY)} + 1 slot + 2 summary rows",
                f"stage 1 to 2: {kilobytes(HIDDEN + 6 * ENTRY)} + 2 slots + 4 summary rows",
                f"stage 2 to 3: {kilobytes(HIDDEN + 8 * ENTRY)} + 8 summary rows",
            ],
        ),
        (
            ["model.lime.history={policy: first_last, first: 1, last: 1}"],
            [f"from each stage to the next, 0 to 3: {kilobytes(HIDDEN + 2 * ENTRY)} + 2 slots"],
        ),
    ],
)  # fmt: skip
def test_lines(overrides: list[str], lines: list[str]) -> None:
    assert describe_boundaries(load_config(None, [*SHAPE, *overrides])) == lines


def test_bytes_are_those_of_the_payload() -> None:
    config = load_config(None, SHAPE)
    assert [boundary.nbytes for boundary in stage_boundaries(config)] == [
        payload_bytes(config.model, bound, 10, 4, boundary_prices(config)) for bound in stage_bounds(config)[1:-1]
    ]
