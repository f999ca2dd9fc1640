"""What crosses a stage boundary: hidden state and live history entries as one contiguous tensor, and its gradient likewise.

The memory is the hidden state [N·D], then the live entries, slots ascending, then summaries ascending. The tensor is shaped
[B, T, C], C being the elements per token, so that the receiver knows B and T. Without a history the payload is the hidden
state itself, [B, T, D], or [B, T, n, D] for the n streams of Hyper-Connections.
"""

from __future__ import annotations

from torch import Tensor

from lime_dist.model.history import LayerHistory


def pack(hidden: Tensor, released: list[Tensor], history: LayerHistory | None) -> Tensor:
    """Payload of a stage that is not the last; ``released`` is what its history handed over after the last layer."""
    return hidden.contiguous() if history is None else history.pack(hidden, released)


def unpack(payload: Tensor, hidden_size: int, history: LayerHistory | None) -> Tensor:
    """Hidden state of a payload; its entries go into the history."""
    return payload if history is None else history.unpack(payload, hidden_size)
