"""Protects what travels over a stage boundary: its bytes, its rounding, and that what is not finite arrives as not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.workers import WorkerGroup
from torch import Tensor

from lime_dist import load_config
from lime_dist.pipeline.wire import Wire
from lime_dist.pipeline.wire_format import PartFormat, WireFormat
from lime_dist.plan.stage_times import boundary_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
HIDDEN, BLOCK = 6, 16


def wire(precision: str, *entries: int) -> Wire:
    """Of a hidden state that travels as it is, quantised parts of so many elements per token, and 2 more that do not."""
    parts = (PartFormat(HIDDEN, False), *(PartFormat(count, True) for count in entries), PartFormat(2, False))
    return Wire(WireFormat(precision, parts, BLOCK), DTYPES[precision], DTYPES[precision])


def cross(way: Wire, payload: Tensor) -> Tensor:
    arrived = way.decode(way.encode(payload), torch.empty_like(payload))
    assert arrived.dtype == payload.dtype
    return arrived


def random_payload(way: Wire, tokens: int, seed: int, spread: float) -> Tensor:
    """[1, T, C]; magnitudes vary by 2^±spread from element to element and block to block."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens, sum(part.elements for part in way.wire_format.parts))
    scales = torch.randn(shape, generator=generator).mul(spread).exp2()
    return (torch.randn(shape, generator=generator) * scales).to(way.dtype)


@settings(max_examples=30, deadline=None)
@given(
    precision=st.sampled_from(list(DTYPES)),
    entries=st.lists(st.sampled_from([16, 48, 64]), min_size=1, max_size=3),
    tokens=st.integers(1, 7),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 3.0, 20.0]),
)
def test_quantised_parts(precision: str, entries: list[int], tokens: int, seed: int, spread: float) -> None:
    """They arrive with 4 significant bits, the other parts as they were; they take as many bytes as predicted; and what has
    arrived can cross again and does not change any more."""
    way = wire(precision, *entries)
    payload = random_payload(way, tokens, seed, spread)
    sent = way.encode(payload)
    assert sent.nbytes == way.wire_format.nbytes(tokens) and sent.dtype == torch.uint8 and sent.is_contiguous()
    assert way.empty(tuple(payload.shape), payload.device).shape == sent.shape
    arrived = cross(way, payload)
    sizes = [part.elements * tokens for part in way.wire_format.parts]
    before, *entries_before, last_before = payload.view(-1).split(sizes)
    after, *entries_after, last_after = arrived.view(-1).split(sizes)
    assert torch.equal(before, after) and torch.equal(last_before, last_after)
    slack = 1.15 if precision == "bf16" else 1.01  # the type of the run rounds as well, and so does the scale
    for own, others in zip(entries_before, entries_after, strict=True):
        exact, error = own.double().view(-1, BLOCK), (others.double() - own.double()).view(-1, BLOCK).abs()
        step = torch.maximum(exact.abs() * 2.0**-4, exact.abs().amax(1, keepdim=True) * 2.0**-10 / 448)
        assert (error <= slack * step).all()
    assert torch.equal(way.encode(arrived), sent) and torch.equal(cross(way, arrived), arrived)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-37, 1e-30, 1e30, 3e38])
def test_very_small_and_very_large_entries(precision: str, scale: float) -> None:
    """The largest element of a block survives wherever bf16 holds it; below 10⁻³⁵, where float8 cannot scale, it may become 0."""
    way = wire(precision, 16)
    payload = (random_payload(way, 3, 1, 0.0).clamp(-1, 1) * scale).to(way.dtype)
    arrived = cross(way, payload)
    assert arrived.isfinite().all()
    error = (arrived.double() - payload.double()).abs()
    assert error.max() <= (2e-36 if scale < 1e-35 else 0.07 * scale)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_arrives_as_not_finite(precision: str, value: float) -> None:
    """Every element of its block: float8 has no infinity. The other blocks are not affected."""
    way = wire(precision, 32)
    payload = random_payload(way, 2, 3, 0.0)
    payload.view(-1)[2 * HIDDEN + 20] = value
    payload.view(-1)[2 * HIDDEN + 17] = 0.0
    arrived = cross(way, payload).view(-1)
    wrong = torch.zeros(payload.numel(), dtype=torch.bool)
    wrong[2 * HIDDEN + 16 : 2 * HIDDEN + 32] = True
    assert torch.equal(~arrived.isfinite(), wrong)


DEEP = [
    "model.num_hidden_layers=64", "model.hidden_size=1024", "model.num_attention_heads=8", "model.intermediate_size=4096",
    "parallel.pipeline_stages=8", "precision=bf16",
]  # fmt: skip


def test_bytes_of_a_deep_pipeline() -> None:
    """64 layers on 8 stages, full history, in bf16: entries take 0.508 of the bytes, and whole payloads little more."""
    llama = sum(boundary_bytes(load_config(None, [*DEEP, "model.architecture=llama"])))
    entries = [*DEEP, "pipeline.boundary=entries"]
    plain, float8 = (
        sum(boundary_bytes(load_config(None, [*entries, f"pipeline.wire_dtype={wire}"]))) for wire in ("null", "fp8")
    )
    assert (float8 - llama) / (plain - llama) == (1 + 2 / 128) / 2
    assert float8 / plain == pytest.approx(0.515, abs=0.001)
    minimal = sum(boundary_bytes(load_config(None, [*DEEP, "pipeline.wire_dtype=fp8"])))
    assert (minimal - llama) / (plain - llama) == pytest.approx(0.3905, abs=0.001), "partial mixtures are not quantised"


def test_a_model_without_history_has_nothing_to_quantise() -> None:
    llama = [*DEEP, "model.architecture=llama"]
    assert boundary_bytes(load_config(None, [*llama, "pipeline.wire_dtype=fp8"])) == boundary_bytes(
        load_config(None, llama)
    )


@pytest.mark.parametrize("direction", ["wire_in", "wire_out"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_is_skipped_because_of_one_entry_of_another_stage(
    workers: Callable[[int], WorkerGroup], direction: str, value: float
) -> None:
    """Of a payload or of its gradient."""
    results: list[Any] = workers(2).run("support.faults.poisoned_entry", direction=direction, value=value)
    assert results == 2 * [{"applied": [True, False, True], "unchanged": True}]
