"""What a model costs, by formula: parameters, and multiply-add FLOPs of a decoder layer and of the output projection."""

from __future__ import annotations

import torch

from lime_dist.config.schema import ModelConfig
from lime_dist.model.layout import live_entries
from lime_dist.model.policies import make_policy


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, a tied weight once; nothing is allocated."""
    from lime_dist.model.decoder import decoder_layers

    counts = {}
    with torch.device("meta"):
        for spec in decoder_layers(config):
            counts[spec.name] = sum(parameter.numel() for parameter in spec.make().parameters())
    return sum(counts.values())


def layer_flops(config: ModelConfig, layer: int, sequence_length: int) -> int:
    """Forward FLOPs per token (2 a multiply-add) of one decoder layer: projections, SwiGLU, causal attention, routing."""
    hidden, size = config.hidden_size, config.head_size
    heads, key_value_heads = config.num_attention_heads, config.key_value_heads
    projections = 2 * hidden * size * (2 * heads + 2 * key_value_heads)
    mlp = 2 * 3 * hidden * config.intermediate_size
    attention = 2 * 2 * heads * size * (sequence_length + 1) // 2
    return projections + mlp + attention + routing_flops(config, layer)


def routing_flops(config: ModelConfig, layer: int) -> int:
    """Forward FLOPs per token that a layer spends on what LLaMA does not have: mixing, router logits, connections."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.architecture == "hyper":
        rate = config.hyper.rate
        coefficients = 2 * rate * hidden * (rate + 2) if config.hyper.dynamic else 0
        return 2 * (coefficients + 2 * rate * (rate + 1) * hidden + 2 * rate * hidden)
    if config.architecture == "llama" or layer < config.lime.start_layer:
        return 0
    read = len(make_policy(config.lime).reads(layer))
    if config.lime.routes == "kv":
        return 2 * config.key_value_heads * (read * config.key_value_heads) * 2 * config.head_size
    logits = 2 * heads * read * hidden if config.lime.router == "dynamic" else 0
    return 2 * heads * read * hidden + logits


def head_flops(config: ModelConfig) -> int:
    """Forward FLOPs per token of the output projection."""
    return 2 * config.hidden_size * config.vocab_size


def boundary_entries(config: ModelConfig, boundary: int) -> int:
    """Entries of the history that cross the boundary before decoder layer ``boundary``, beside the hidden state."""
    if config.architecture != "lime":
        return 0
    return len(live_entries(make_policy(config.lime), boundary, config.num_hidden_layers))
