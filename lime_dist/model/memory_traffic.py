"""Memory traffic of a model beside its matrix products: norms, activations, rotations, sums, and the copies of a layer history.

By rule of thumb, not by counting. One operation writes what autograd keeps of a layer, and the next one reads it. In backward
it is read again while a gradient of the same size is written and read. So a forward pass moves twice what is kept, and a
backward pass four times that. benchmarks/planning.py measures how well this predicts times.
"""

from __future__ import annotations

from lime_dist.config.schema import ModelConfig
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of

FORWARD, BACKWARD = 2, 4
"""How often a pass moves what is kept."""


def layer_traffic(config: ModelConfig, layer: int, num_tokens: int, itemsize: int) -> tuple[float, float]:
    """Bytes moved in a decoder layer's forward and backward pass over one micro-batch."""
    architecture = architecture_of(config)
    kept = architecture.activation_bytes(layer, num_tokens, itemsize, checkpointing=False)
    history = architecture.entry_width * num_tokens * itemsize * architecture.entries_moved(layer)
    return FORWARD * kept + history, BACKWARD * kept + 2 * history


def head_traffic(config: ModelConfig, num_tokens: int, itemsize: int) -> tuple[float, float]:
    """Bytes moved for the final norm, the logits and the loss."""
    kept = cost.head_activation_bytes(config, num_tokens, itemsize)
    return FORWARD * kept, BACKWARD * kept
