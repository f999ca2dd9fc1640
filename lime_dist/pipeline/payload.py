"""What crosses a stage boundary: hidden state and live history entries as one contiguous tensor, and its gradient likewise.

The memory is the hidden state [N·D], then the live slots, ascending, as they lie in the history. The tensor is shaped
[B, T, C], C being the elements per token, so that the receiver knows B and T. Without a history the payload is the
hidden state itself, [B, T, D], or [B, T, n, D] for the n streams of Hyper-Connections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory


def pack(hidden_BTD: Tensor, token: Tensor | None, history: LayerHistory | None) -> Tensor:
    """Payload of a stage that is not the last; ``token`` is the one that the last layer left."""
    return hidden_BTD.contiguous() if history is None else _Pack.apply(token, hidden_BTD, history)


def unpack(payload_BTC: Tensor, hidden_size: int, history: LayerHistory | None) -> Tensor:
    """Hidden state [B, T, D] of a payload; its entries go into the history."""
    if history is None:
        return payload_BTC
    hidden, history.token = _Unpack.apply(payload_BTC, hidden_size, history)
    return hidden


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, hidden_BTD: Tensor, history: LayerHistory) -> Tensor:
        ctx.history, ctx.hidden_shape = history, hidden_BTD.shape
        sent = [history.layout.position(slot) for slot in history.layout.sent]
        batch, length, size = hidden_BTD.shape
        width = size + len(sent) * history.entries[0].numel() // (batch * length)
        payload = hidden_BTD.new_empty(batch, length, width)
        flat = payload.view(-1)
        flat[: hidden_BTD.numel()] = hidden_BTD.reshape(-1)
        entries = flat[hidden_BTD.numel() :].view(len(sent), *history.slot_shape)
        for index, position in enumerate(sent):
            entries[index].copy_(history.entries[position])
        return payload

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        history: LayerHistory = ctx.history
        flat = gradients[0].contiguous().view(-1)
        size = ctx.hidden_shape.numel()
        history.incoming = flat[size:].view(len(history.layout.sent), *history.slot_shape)
        return flat.new_zeros(()), flat[:size].view(ctx.hidden_shape), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, payload_BTC: Tensor, hidden_size: int, history: LayerHistory) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.payload_shape = history, payload_BTC.shape
        batch, length, _ = payload_BTC.shape
        flat = payload_BTC.contiguous().view(-1)
        size = batch * length * hidden_size
        received = flat[size:].view(-1, *history.slot_shape)
        history.entries[: len(received)].copy_(received)
        return flat[:size].view(batch, length, hidden_size).clone(), torch.zeros_like(history.token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden_gradient = gradients[0]
        payload_gradient = hidden_gradient.new_empty(ctx.payload_shape)
        flat = payload_gradient.view(-1)
        flat[: hidden_gradient.numel()] = hidden_gradient.reshape(-1)
        flat[hidden_gradient.numel() :] = ctx.history.received_gradient().view(-1)
        return payload_gradient, None, None
