"""What layers read, from the weights of their routers: layer × layer maps, and figures of them.

A map's cell [ℓ, ℓ'] says how much layer ℓ takes from layer ℓ', whatever the policy: where ℓ reads summaries, its weights for
them and the summaries' own weights are multiplied, and what it takes from a layer by both ways is added before the absolute
value is taken. With ``routes: hidden`` that leaves aside that summaries are normed before they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.parameters import chunk_ends
from lime_dist.model.policies import Entry, make_policy
from lime_dist.model.routing import prune

Weights = Mapping[str, Tensor]
"""By exported name; only routers and chunk summaries are looked at."""
PARTS = ("first_weight", "summary_weight", "weight")
"""Of a router over keys and values, in the order of its columns."""


def has_map(config: ModelConfig) -> bool:
    """Whether there are weights that are the same for all tokens."""
    return config.architecture == "lime" and config.lime.router == "static"


def weight_names(config: ModelConfig) -> list[str]:
    """Exported names that a map may need; not every layer has all of them."""
    routers = [f"{_router(layer)}.{part}" for layer in range(config.num_hidden_layers) for part in PARTS]
    return routers + [f"model.history.chunks.{chunk.index}.weight" for chunk in chunk_ends(config).values()]


def router_map(config: ModelConfig, weights: Weights) -> Tensor:
    """[L, L]: mean |weight| over all pairs of heads (``routes: kv``), or over heads.

    Raises:
        KeyError: a weight is missing.
        RuntimeError: a weight has another shape.
    """
    return torch.stack([head_map(config, weights, layer).mean(0) for layer in range(config.num_hidden_layers)])


def head_map(config: ModelConfig, weights: Weights, layer: int) -> Tensor:
    """[reading heads, L] of one layer: mean |weight| over the heads that are read (``routes: hidden`` reads without heads).

    A layer without a router takes its own: the identity (``routes: kv``), or 1.
    """
    kv = config.lime.routes == "kv"
    heads, read_heads = config.key_value_heads, config.key_value_heads if kv else 1
    found = torch.zeros(heads, config.num_hidden_layers, read_heads)
    reads = make_policy(config.lime).reads(layer)
    if kv:
        parts = [weights[name] for part in PARTS if (name := f"{_router(layer)}.{part}") in weights]
        if not parts and layer > 0:
            raise KeyError(f"{_router(layer)}.weight")
        matrix = torch.cat(parts, 1).float() if parts else torch.eye(heads)
    elif layer < config.lime.start_layer:
        matrix = torch.ones(heads, 1)
    else:
        matrix = weights[f"{_router(layer)}.weight"].float().softmax(-1)
        if config.lime.top_p is not None and config.lime.top_p != 1:
            matrix = prune(matrix, config.lime.top_p)
    by_entry = matrix.view(heads, len(reads), read_heads).transpose(0, 1)  # [entries, heads, heads read]
    for entry, weight in zip(reads, by_entry, strict=True):
        if entry.is_summary:
            found[:, entry.layers.start : entry.layers.stop] += _through(config, weights, entry, weight)
        else:
            found[:, entry.layer] += weight
    return found.abs().mean(-1)


def _through(config: ModelConfig, weights: Weights, entry: Entry, weight: Tensor) -> Tensor:
    """[heads, layers of the chunk, heads read]: weights [heads, heads of a summary's row] times that row's own."""
    chunk = chunk_ends(config)[entry.layer]
    own = weights[f"model.history.chunks.{chunk.index}.weight"].float()
    if config.lime.routes == "hidden":
        return weight.unsqueeze(1) * own[entry.row].softmax(-1).view(1, -1, 1)
    heads = config.key_value_heads
    row = own[entry.row * heads : (entry.row + 1) * heads]
    return (weight @ row).view(heads, len(chunk.layers), heads)


def shares(layers: Tensor) -> Tensor:
    """Rows of a map, each divided by its sum."""
    return layers / layers.sum(-1, keepdim=True).clamp_min(torch.finfo(layers.dtype).tiny)


def self_retrieval(layers: Tensor) -> Sequence[float]:
    """By layer: the share of what it reads that is its own."""
    found: list[float] = shares(layers).diagonal().tolist()
    return found


def entropy(layers: Tensor) -> Sequence[float]:
    """By layer: in nats, how widely it reads; 0: from one layer alone, ln(ℓ + 1): from all alike."""
    found: list[float] = torch.special.entr(shares(layers)).sum(-1).tolist()
    return found


def _router(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.router"
