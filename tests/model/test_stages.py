"""Protects the stages of a model without a pipeline engine: in one process, one after the other, they equal the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.policies import POLICIES
from torch import Tensor, nn

from benchmarks.equality import perturb
from lime_dist.config.load import make_config
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import stage_layout
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.decoder import (
    Decoder,
    apply_head,
    build_decoder,
    embed,
    later_readers,
    open_history,
    run_layers,
)
from lime_dist.model.layers import language_model_loss
from lime_dist.pipeline.payload import pack, unpack

LAYERS, BATCH, LENGTH = 9, 2, 5
BOUNDS = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 7, 9], [0, 5, 9], [0, 8, 9]]


def config_of(history: dict[str, Any], heads: int = 2) -> ModelConfig:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    model = {**sizes, "num_attention_heads": 4, "num_key_value_heads": heads, "lime": {"history": history}}
    return make_config({"model": {"architecture": "lime", **model}}, "a test").model


def stage_modules(decoder: Decoder, start: int, stop: int) -> list[nn.Module]:
    names = [spec.name for spec in decoder.specs]
    end = names.index(f"model.layers.{stop}") if stop < LAYERS else len(names) - 2
    return [decoder.get_submodule(name) for name in names[names.index(f"model.layers.{start}") : end]]


def run_stages(
    decoder: Decoder, bounds: Sequence[int], prices: Prices, tokens_BT: Tensor, checkpointing: bool
) -> Tensor:
    """Forward and backward through the stages; returns the loss. Gradients are accumulated in the decoder."""
    config, dtype = decoder.config, next(decoder.parameters()).dtype
    embedding, *_, norm, head = (decoder.get_submodule(spec.name) for spec in decoder.specs)
    payload, inputs, outputs = tokens_BT, [], []
    for start, stop in pairwise(bounds):
        layout = stage_layout(config, start, stop, prices)
        history = open_history(config, layout, tokens_BT.numel(), dtype, torch.device("cpu"))
        if start:
            inputs.append(payload := payload.detach().requires_grad_())
            hidden = unpack(payload, config.hidden_size, history)
        else:
            hidden = embed(config, embedding, tokens_BT)
        later = [decoder.get_submodule(spec.name) for spec in later_readers(config, layout)]
        hidden, released = run_layers(stage_modules(decoder, start, stop), hidden, history, checkpointing, later)
        if stop < LAYERS:
            outputs.append(payload := pack(hidden, released, history))
    loss = language_model_loss(apply_head(config, norm, head, hidden), tokens_BT)
    loss.backward()
    for output, received in zip(reversed(outputs), reversed(inputs), strict=True):
        output.backward(received.grad)
    return loss.detach()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prices", [Prices(1, 1), Prices(2, 1), ENTRIES], ids=["minimal", "mixtures", "entries"])
def test_stages_equal_the_whole_model(policy: str, prices: Prices) -> None:
    """Loss and all gradients, for stages of one layer and of unequal sizes, with and without checkpointing."""
    config = config_of(POLICIES[policy])
    decoder = build_decoder(config, dtype=torch.float64)
    for name, parameter in decoder.named_parameters():
        perturb(name, parameter)
    tokens_BT = torch.randint(0, 31, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = language_model_loss(decoder(tokens_BT), tokens_BT)
    whole.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    for index, bounds in enumerate(BOUNDS):
        decoder.zero_grad()
        loss = run_stages(decoder, bounds, prices, tokens_BT, checkpointing=bool(index % 2))
        assert loss == pytest.approx(whole.item(), rel=1e-12)
        for name, parameter in decoder.named_parameters():
            error = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error <= 1e-10, f"{name}, stages {bounds}: {error:.1e}"
