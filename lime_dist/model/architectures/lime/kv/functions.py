"""The autograd Functions of `KeyValueHistory`: what writes, reads and crosses boundaries, and in which order backward does.

Each takes the ``dependency`` of the operation before it and returns one for the next (see `history.py`). They hold the
history, do nothing themselves, and call its public methods.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lime_dist.model.chunks import Chunk
from lime_dist.model.history import separate_view

if TYPE_CHECKING:
    from lime_dist.model.architectures.lime.kv.history import KeyValueHistory


class Mix(torch.autograd.Function):
    """Writes a slot and reads a mixture; in backward, turns the gradient of the mixture into that of the slot."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, k_NGd: Tensor, v_NGd: Tensor, history: KeyValueHistory, layer: int
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.layer = history, layer
        history.write_slot(layer, k_NGd, v_NGd)
        return history.read_mixture(layer), torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient, dependency_gradient = gradients
        # All newer layers have been visited: autograd runs their backward first, because they depend on this one.
        key, value = ctx.history.visit(ctx.layer, gradient).unbind(1)
        return dependency_gradient, key.transpose(0, 1), value.transpose(0, 1), None, None


class Summarise(torch.autograd.Function):
    """Writes a chunk's summary; in backward, after all of its readers, leaves its gradient in its place."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: KeyValueHistory, chunk: Chunk) -> Tensor:
        ctx.history, ctx.chunk = history, chunk
        history.write_summary(chunk)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # The chunk's slots find the summary's gradient in the buffer, like that of any other reader, when they are visited.
        ctx.history.visit_summary(ctx.chunk)
        return gradients[0], None, None


class Pack(torch.autograd.Function):
    """Writes what crosses a boundary behind the hidden state; in backward, keeps its gradient."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, hidden_BTD: Tensor, history: KeyValueHistory) -> Tensor:
        ctx.history, ctx.part, ctx.hidden_shape = history, history.part, hidden_BTD.shape
        batch, length, size = hidden_BTD.shape
        sent_shape = history.sent_shape
        payload = hidden_BTD.new_empty(batch, length, size + math.prod(sent_shape) // (batch * length))
        flat = payload.view(-1)
        flat[: hidden_BTD.numel()] = hidden_BTD.reshape(-1)
        history.write_sent(flat[hidden_BTD.numel() :].view(sent_shape))
        return payload

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # This runs before any layer is visited. The gradients wait in the history until their layers are.
        history: KeyValueHistory = ctx.history
        flat = gradients[0].contiguous().view(-1)
        size = ctx.hidden_shape.numel()
        history.take_sent_gradient(ctx.part, flat[size:].view(-1, *history.slot_shape))
        return flat.new_zeros(()), flat[:size].view(ctx.hidden_shape), None


class Unpack(torch.autograd.Function):
    """Takes what was received into the history; in backward, after all layers, sends back its gradient."""

    @staticmethod
    def forward(ctx: Any, payload_BTC: Tensor, hidden_size: int, history: KeyValueHistory) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.part, ctx.payload_shape = history, history.part, payload_BTC.shape
        batch, length, _ = payload_BTC.shape
        flat = payload_BTC.contiguous().view(-1)
        size = batch * length * hidden_size
        if (
            payload_BTC.data_ptr() == history.memory.data_ptr()
        ):  # received into the history's own memory: nothing to copy
            hidden = separate_view(history.memory, (batch, length, hidden_size))
        else:
            history.take_received(flat[size:].view(-1, *history.slot_shape))
            hidden = flat[:size].view(batch, length, hidden_size).clone()
        return hidden, torch.zeros_like(history.dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden_gradient = gradients[0]
        payload_gradient = hidden_gradient.new_empty(ctx.payload_shape)
        flat = payload_gradient.view(-1)
        flat[: hidden_gradient.numel()] = hidden_gradient.reshape(-1)
        received = flat[hidden_gradient.numel() :].view(-1, *ctx.history.slot_shape)
        ctx.history.received_gradient(ctx.part, received)
        return payload_gradient, None, None
