"""Memory traffic of a model beside its matrix products: norms, activations, rotations, sums, and the copies of a layer history.

By rule of thumb, not by counting. One operation writes what autograd keeps of a layer, and the next one reads it. In backward
it is read again while a gradient of the same size is written and read. So a forward pass moves twice what is kept, and a
backward pass four times that. A history over keys and values is counted in forward (tests/model/test_memory_traffic.py), and a
backward pass moves twice as much of it. benchmarks/planning.py measures how well this predicts times.
"""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.config.schema import ModelConfig
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of
from lime_dist.model.crossing import ENTRIES, Prices

FORWARD, BACKWARD = 2, 4
"""How often a pass moves what is kept."""
HISTORY_BACKWARD = 2
"""How often a backward pass moves what a forward pass moves of the history."""


def stage_traffic(
    config: ModelConfig, parts: Sequence[range], num_tokens: int, itemsize: int, prices: Prices = ENTRIES
) -> tuple[float, float]:
    """Bytes moved in the forward and the backward pass of a stage's decoder layers over one micro-batch.

    Args:
        parts: the layers of each part of the stage.
    """
    architecture = architecture_of(config)
    kept = sum(
        architecture.activation_bytes(layer, num_tokens, itemsize, False) for layers in parts for layer in layers
    )
    history = architecture.entry_width * num_tokens * itemsize * architecture.entries_moved(parts, prices)
    return FORWARD * kept + history, BACKWARD * kept + HISTORY_BACKWARD * history


def feed_forward_traffic(config: ModelConfig, num_tokens: int, itemsize: int) -> float:
    """Bytes moved when backward computes the feed-forward half of a decoder layer again."""
    return FORWARD * cost.feed_forward_activation_bytes(config, num_tokens, itemsize)


def head_traffic(config: ModelConfig, num_tokens: int, itemsize: int) -> tuple[float, float]:
    """Bytes moved for the final norm, the logits and the loss."""
    kept = cost.head_activation_bytes(config, num_tokens, itemsize)
    return FORWARD * kept, BACKWARD * kept
