"""What layers read, from the weights of their routers: layer × layer maps, and statistics of them.

Cell [ℓ, ℓ'] of a map is how much layer ℓ reads of layer ℓ', for every history policy. Where ℓ reads a summary, its weight is
multiplied by the summary's own weights. If ℓ reads a layer both directly and through a summary, both are added before the
absolute value is taken. Where weights depend on the token, a map shows their means. Where layers read the embedding too, it comes
first (`Architecture.first_column`): then a map has L + 1 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of

Weights = Mapping[str, Tensor]
"""By exported name, routers and chunk summaries; by `mean_weights_name`, mean weights over tokens."""


def has_map(config: ModelConfig) -> bool:
    """Whether there are router weights that are the same for all tokens."""
    return architecture_of(config).router_map_obstacle is None


def has_mean_map(config: ModelConfig) -> bool:
    """Whether layers read with weights that depend on the token."""
    return architecture_of(config).has_mean_map


def router_map(config: ModelConfig, weights: Weights) -> Tensor:
    """How much each layer reads of every layer, [L, columns]: the mean of `head_map` over the reading heads.

    Raises:
        KeyError: a weight is missing.
        RuntimeError: a weight has another shape.
    """
    return torch.stack([head_map(config, weights, layer).mean(0) for layer in range(config.num_hidden_layers)])


def head_map(config: ModelConfig, weights: Weights, layer: int) -> Tensor:
    """How much each head of a layer reads of every layer, [reading heads, columns]: the mean |weight| over the heads of a slot.

    A layer without a router reads its own slot.
    """
    return architecture_of(config).head_map(weights, layer)


def shares(layers: Tensor) -> Tensor:
    """Rows of a map, each divided by its sum."""
    return layers / layers.sum(-1, keepdim=True).clamp_min(torch.finfo(layers.dtype).tiny)


def self_retrieval(layers: Tensor) -> Sequence[float]:
    """By layer: the share of its reads that goes to its own slot."""
    own: list[float] = shares(layers).diagonal(layers.shape[1] - len(layers)).tolist()
    return own


def entropy(layers: Tensor) -> Sequence[float]:
    """By layer: entropy of its reads in nats; 0: it reads one layer only; ln(ℓ + 1): it reads all layers equally."""
    nats: list[float] = torch.special.entr(shares(layers)).sum(-1).tolist()
    return nats
