"""Protects router maps: they are what a layer takes from each layer's slot when slots are pushed through one at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.policies import POLICIES
from torch import Tensor

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of
from lime_dist.model.chunks import summarised_chunks
from lime_dist.model.policies import Entry, make_policy
from lime_dist.monitor.routers import entropy, has_map, head_map, router_map, self_retrieval, shares

LAYERS, HEADS, KEY_VALUE_HEADS = 9, 4, 2
ROUTES: dict[str, dict[str, Any]] = {
    "kv": {},
    "hidden": {"routes": "hidden", "start_layer": 2},
    "top_p": {"routes": "hidden", "top_p": 0.6},
}


def make_config(**lime: Any) -> ModelConfig:
    kv = lime.get("routes", "kv") == "kv"
    return ModelConfig.model_validate(
        {
            "vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS if kv else None, "lime": lime,
        }
    )  # fmt: skip


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    """Perturbed weights, only those that a map needs."""
    routers = {}
    for name, parameter in build_decoder(config).named_parameters():
        perturb(name, parameter)
        if name in architecture_of(config).router_parameters:
            routers[name] = parameter.detach()
    return routers


def taken(config: ModelConfig, decoder: Any, layer: int, source: int, read_head: int) -> Tensor:
    """[reading heads]: the mixture of a layer when the slot of one layer and head is 1 and all others are 0."""
    kv = config.lime.routes == "kv"
    heads = config.key_value_heads if kv else 1
    entries: dict[Entry, Tensor] = {Entry(each): torch.zeros(heads) for each in range(LAYERS)}
    entries[Entry(source)][read_head] = 1.0
    policy = make_policy(config.lime)
    for chunk in summarised_chunks(policy, LAYERS):
        own = decoder.model.history.chunks[chunk.index].weight
        own = own if kv else own.softmax(-1)
        made = (own @ torch.cat([entries[entry] for entry in chunk.sources])).view(chunk.num_rows, heads)
        entries |= dict(zip(chunk.rows, made, strict=True))
    router = decoder.model.layers[layer].self_attn.router
    read = [entries[entry] for entry in policy.reads(layer)]
    if router is None:
        return read[-1] if kv else read[-1].expand(config.num_attention_heads)
    matrix = router.matrix()
    return matrix @ torch.cat(read) if kv else matrix @ torch.stack(read)[:, 0]


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_map_is_what_layers_take(routes: str, policy: str) -> None:
    config = make_config(**ROUTES[routes], history=POLICIES[policy])
    weights = weights_of(config)
    decoder = build_decoder(config)
    decoder.load_state_dict(weights, strict=False)
    read_heads = KEY_VALUE_HEADS if routes == "kv" else 1
    weights_LL = router_map(config, weights)
    assert weights_LL.shape == (LAYERS, LAYERS)
    with torch.no_grad():
        for layer in range(LAYERS):
            by_source = [
                torch.stack([taken(config, decoder, layer, source, head).abs() for head in range(read_heads)]).mean(0)
                for source in range(LAYERS)
            ]
            expected = torch.stack(by_source, 1)
            torch.testing.assert_close(head_map(config, weights, layer), expected)
            torch.testing.assert_close(weights_LL[layer], expected.mean(0))


def test_models_without_a_map() -> None:
    assert not has_map(make_config(routes="hidden", router="dynamic"))
    assert not has_map(ModelConfig(architecture="llama"))
    assert has_map(make_config())


def test_a_weight_that_is_missing_is_named() -> None:
    config = make_config()
    weights = weights_of(config)
    del weights["model.layers.4.self_attn.router.weight"]
    with pytest.raises(KeyError, match=r"model\.layers\.4\.self_attn\.router\.weight"):
        router_map(config, weights)


def test_figures_of_a_map() -> None:
    layers = torch.tensor([[2.0, 0, 0], [1, 3, 0], [1, 1, 1]])
    assert shares(layers).sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert self_retrieval(layers) == pytest.approx([1, 0.75, 1 / 3])
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy(layers) == pytest.approx([0, quarter, math.log(3)], abs=1e-6)
    assert entropy(torch.zeros(2, 2)) == [0, 0]
