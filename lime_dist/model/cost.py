"""What a model costs, by formula: multiply-add FLOPs of a decoder layer and of the output projection."""

from __future__ import annotations

from lime_dist.config.schema import ModelConfig
from lime_dist.model.history import make_policy


def layer_flops(config: ModelConfig, layer: int, sequence_length: int) -> int:
    """Forward FLOPs per token (2 a multiply-add) of one decoder layer: projections, SwiGLU, causal attention, routing."""
    hidden, size = config.hidden_size, config.head_size
    heads, key_value_heads = config.num_attention_heads, config.key_value_heads
    projections = 2 * hidden * size * (2 * heads + 2 * key_value_heads)
    mlp = 2 * 3 * hidden * config.intermediate_size
    attention = 2 * 2 * heads * size * (sequence_length + 1) // 2
    routing = 0
    if config.architecture == "lime" and layer > 0:
        read = len(make_policy(config.lime.history).reads(layer))
        routing = 2 * key_value_heads * (read * key_value_heads) * 2 * size
    return projections + mlp + attention + routing


def head_flops(config: ModelConfig) -> int:
    """Forward FLOPs per token of the output projection."""
    return 2 * config.hidden_size * config.vocab_size
