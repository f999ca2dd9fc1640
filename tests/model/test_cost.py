"""Protects the formulas: parameters, FLOPs, entries and bytes are those that are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.policies import POLICIES
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from lime_dist import build_decoder
from lime_dist.config.schema import ModelConfig
from lime_dist.model import cost
from lime_dist.model.decoder import open_history, run_layers, stage_layout
from lime_dist.pipeline.payload import pack, unpack

BATCH, LENGTH, LAYERS = 2, 8, 11

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "hyper static": {"architecture": "hyper", "hyper": {"rate": 2, "dynamic": False}},
    "hyper dynamic": {"architecture": "hyper", "hyper": {"rate": 3}},
    "top_p": {"lime": {"routes": "hidden", "top_p": 0.5}},
    **{f"kv, {name}": {"num_key_value_heads": 2, "lime": {"history": history}} for name, history in POLICIES.items()},
    **{
        f"static, {name}": {"lime": {"routes": "hidden", "start_layer": 3, "history": history}}
        for name, history in POLICIES.items()
    },
    **{
        f"dynamic, {name}": {"lime": {"routes": "hidden", "router": "dynamic", "history": history}}
        for name, history in POLICIES.items()
    },
}
CUTS = [(0, LAYERS), (0, 5), (5, LAYERS), (4, 7)]


def make_config(model: str, **changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 19, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, **MODELS[model], **changes})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model", MODELS)
def test_parameters(model: str, tied: bool) -> None:
    config = make_config(model, tie_word_embeddings=tied)
    assert cost.count_parameters(config) == sum(p.numel() for p in build_decoder(config).parameters())


def count_flops(config: ModelConfig, start: int, stop: int) -> tuple[float, float]:
    """Forward and backward FLOPs of one stage's decoder layers, counted by torch; its payload's gradient is random."""
    decoder = build_decoder(config)
    found = [decoder.get_submodule(spec.name) for spec in decoder.specs]
    begin = next(i for i, spec in enumerate(decoder.specs) if spec.name == f"model.layers.{start}")
    end = begin
    while end < len(found) - 2 and decoder.specs[end].name != f"model.layers.{stop}":
        end += 1
    layout = stage_layout(config, start, stop)
    streams = (config.hyper.rate,) if config.architecture == "hyper" else ()
    shape = (BATCH, LENGTH, *streams, config.hidden_size)
    history = open_history(config, layout, BATCH * LENGTH, torch.float32, torch.device("cpu"))
    if start:
        size = cost.payload_bytes(config, start, BATCH * LENGTH, 1) // (BATCH * LENGTH)
        inputs = torch.randn(*(shape if streams else (BATCH, LENGTH, size)), requires_grad=True)
        hidden = unpack(inputs, config.hidden_size, history)
    else:
        hidden = torch.randn(shape, requires_grad=True)

    # Neither the CPU's causal attention, counted without the pairs that are masked, nor sums in place are in torch's table.
    pairs = (LENGTH + 1) / 2 / LENGTH
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        attention: lambda q, k, v, *_, out_shape=None, **__: pairs * sdpa_flop_count(q, k, v),
        torch.ops.aten.addmm_: lambda _, a, b, **__: mm_flop(a, b),
        backward: lambda g, q, k, v, *_, out_shape=None, **__: pairs * sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as forward_count:
        hidden, released = run_layers(found[begin:end], hidden, history, False)
        out = pack(hidden, released, history) if stop < config.num_hidden_layers else hidden
    with FlopCounterMode(display=False, custom_mapping=known) as backward_count:
        out.backward(torch.randn_like(out))
    return forward_count.get_total_flops(), backward_count.get_total_flops()


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_flops_of_a_stage(model: str, cut: tuple[int, int]) -> None:
    """A stage in the middle, so that received entries, their gradients and unfinished chunks count."""
    config = make_config(model)
    layers = cost.layer_flops(config, LENGTH, range(*cut))
    forward, backward = count_flops(config, *cut)
    assert sum(flops.forward for flops in layers) * BATCH * LENGTH == forward
    assert sum(flops.backward for flops in layers) * BATCH * LENGTH == backward


def test_flops_of_the_head() -> None:
    config = make_config("llama")
    decoder = build_decoder(config)
    normed = torch.randn(BATCH, LENGTH, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as count:
        decoder.model.embed_tokens.logits(normed).sum().backward()
    assert cost.head_flops(config).both * BATCH * LENGTH == count.get_total_flops()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_history_and_payload(model: str, precision: torch.dtype) -> None:
    config = make_config(model)
    tokens = BATCH * LENGTH
    for boundary in range(1, LAYERS):
        layout = stage_layout(config, 0, boundary)
        history = open_history(config, layout, tokens, precision, torch.device("cpu"))
        counted = 0
        if history is not None:
            counted = history.entries.nbytes
            assert len(history.layout.sent) == cost.boundary_entries(config, boundary)
            if config.lime.routes == "hidden":
                counted += history.gradients.nbytes
        assert cost.history_bytes(config, range(boundary), tokens, precision.itemsize) == counted
        streams = (config.hyper.rate,) if config.architecture == "hyper" else ()
        hidden = torch.zeros(BATCH, LENGTH, *streams, config.hidden_size, dtype=precision)
        if history is None or config.lime.routes == "hidden":
            sent = [torch.zeros(tokens, config.hidden_size, dtype=precision)] * cost.boundary_entries(config, boundary)
        else:
            sent = history.release()
        payload = pack(hidden, sent, history)
        assert payload.nbytes == cost.payload_bytes(config, boundary, tokens, precision.itemsize)
