"""Bytes that a model moves to and from memory beside its matrix products: norms, activations, rotations, sums, and the copies
that a layer history takes.

By rule of thumb, not by counting: what autograd keeps of a layer has been written by one operation and is read by the next,
and in backward it is read again while a gradient of the same size is written and read. So a forward pass moves twice what is
kept, a backward pass four times that. benchmarks/planning.py says how well times are predicted with it.
"""

from __future__ import annotations

from lime_dist.config.schema import ModelConfig
from lime_dist.model import cost
from lime_dist.model.layout import block_size
from lime_dist.model.parameters import entries_weighed

FORWARD, BACKWARD = 2, 4
"""How often a pass moves what is kept."""


def layer_traffic(config: ModelConfig, layer: int, num_tokens: int, itemsize: int) -> tuple[float, float]:
    """Bytes of a decoder layer's forward and backward pass over one micro-batch."""
    kept = cost.activation_bytes(config, layer, num_tokens, itemsize, checkpointing=False)
    entry = cost.entry_width(config) * num_tokens * itemsize
    mixed = entry * _entries_moved(config, layer) if config.architecture == "lime" else 0.0
    return FORWARD * kept + mixed, BACKWARD * kept + 2 * mixed


def _entries_moved(config: ModelConfig, layer: int) -> float:
    """Entries' worth that a layer reads and writes: its own goes into the history; it reads what its block has by itself, and
    what is older once for the whole block; its mixture, with ``routes: hidden`` one of a state for every head, is written
    and read."""
    block = block_size(config)
    read: float = len(entries_weighed(config, layer))
    mixtures = config.num_attention_heads if config.lime.routes == "hidden" else 1
    if config.lime.router == "static":
        read = min(read, block / 2 + read / block)
    return 2 + read + 2 * mixtures


def head_traffic(config: ModelConfig, num_tokens: int, itemsize: int) -> tuple[float, float]:
    """Bytes of the last norm, the logits and the loss."""
    kept = cost.head_activation_bytes(config, num_tokens, itemsize)
    return FORWARD * kept, BACKWARD * kept
