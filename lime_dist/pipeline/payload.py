"""The payload: hidden state and what crosses of the history, as the one contiguous tensor that crosses a stage boundary.

Its memory holds one part after the other (`cost.PayloadParts`): the hidden state [N·D], then entries, then partial mixtures, both in
the order of `lime_dist.model.crossing.Crossing`. `wire.py` may send each part in a form of its own. Its shape is [B, T, C] with C
elements per token, so that the receiver knows B and T. Without a history the payload is the hidden
state itself: [B, T, D], or [B, T, n, D] for the n streams of Hyper-Connections. The gradient has the same layout.
"""

from __future__ import annotations

from torch import Tensor

from lime_dist.model.history import LayerHistory


def pack(hidden: Tensor, released: list[Tensor], history: LayerHistory | None) -> Tensor:
    """The payload of a stage other than the last. ``released`` is what its history has released after the last layer."""
    return hidden.contiguous() if history is None else history.pack(hidden, released)


def unpack(payload: Tensor, hidden_size: int, history: LayerHistory | None) -> Tensor:
    """The hidden state of a payload. Its entries go into the history."""
    return payload if history is None else history.unpack(payload, hidden_size)
