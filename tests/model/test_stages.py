"""Protects the stages of a model without a pipeline engine: in one process, one after the other, they equal the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.policies import POLICIES

from benchmarks.equality import perturb
from benchmarks.staged import staged_logits
from lime_dist.config.load import make_config
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.decoder import build_decoder
from lime_dist.model.layers import language_model_loss

LAYERS, BATCH, LENGTH = 9, 2, 5
BOUNDS = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 7, 9], [0, 5, 9], [0, 8, 9]]


KINDS: dict[str, tuple[dict[str, Any], Prices]] = {
    "minimal": ({}, Prices(1, 1)),
    "mixtures": ({}, Prices(2, 1)),
    "entries": ({}, ENTRIES),
    "moda": ({"depth_attention": "moda"}, ENTRIES),
    "moda, MLP": ({"depth_attention": "moda", "mlp_entries": True}, ENTRIES),
}
"""Keys of `model.lime`, and prices of what crosses boundaries."""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_stages_equal_the_whole_model(policy: str, kind: str) -> None:
    """Loss and all gradients, for stages of one layer and of unequal sizes, with every kind of checkpointing."""
    lime, prices = KINDS[kind]
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    model = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "lime": {**lime, "history": POLICIES[policy]}}
    decoder = build_decoder(make_config({"model": model}, "a test").model, dtype=torch.float64)
    for name, parameter in decoder.named_parameters():
        perturb(name, parameter)
    tokens_BT = torch.randint(0, 31, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = language_model_loss(decoder(tokens_BT), tokens_BT)
    whole.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    for index, bounds in enumerate(BOUNDS):
        decoder.zero_grad()
        decoder.activation_checkpointing = (False, True, "selective")[index % 3]
        logits = staged_logits(decoder, tokens_BT, bounds, [torch.clone] * 3, [torch.clone] * 3, prices)
        loss = language_model_loss(logits, tokens_BT)
        loss.backward()
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        for name, parameter in decoder.named_parameters():
            error = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error <= 1e-10, f"{name}, stages {bounds}: {error:.1e}"
