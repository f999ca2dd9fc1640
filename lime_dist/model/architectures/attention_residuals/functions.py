"""The autograd Functions of `DepthHistory`: what writes and reads finished blocks and crosses boundaries, in which order.

Each takes the ``dependency`` of the operation before it and returns one for the next (see `history.py`). They hold the history, do
little themselves, and call its public methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lime_dist.model.history import separate_view

if TYPE_CHECKING:
    from lime_dist.model.architectures.attention_residuals.history import DepthHistory


class TakeQueries(torch.autograd.Function):
    """Stacks the queries of the stage's readers; in backward, after all of them, returns the gradients."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: DepthHistory, *queries: Tensor) -> Tensor:
        ctx.history, ctx.part, ctx.rows = history, history.part, [len(query) for query in queries]
        history.take_queries(torch.cat(queries))
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        of_part = ctx.history.query_gradients[ctx.part].to(gradients[0].dtype)
        return gradients[0], None, *of_part.split(ctx.rows)


class Write(torch.autograd.Function):
    """Writes the output of a finished block; in backward, after all of its readers, returns its gradient."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, finished_ND: Tensor, history: DepthHistory, sublayer: int) -> Tensor:
        ctx.history, ctx.sublayer = history, sublayer
        history.write_block(sublayer, finished_ND)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], ctx.history.block_gradient(ctx.sublayer), None, None


class Read(torch.autograd.Function):
    """Mixes finished blocks and the running sum of an unfinished one. It keeps the mixture, which the next norm keeps as well, but
    no weights: backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, running_ND: Tensor | None, history: DepthHistory, sublayer: int
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.sublayer = history, sublayer
        mixture_ND, sums_N = history.mixture(sublayer, running_ND)
        ctx.save_for_backward(running_ND, mixture_ND, sums_N)
        return mixture_ND, torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient_ND, dependency_gradient = gradients
        running_gradient = ctx.history.visit(ctx.sublayer, *ctx.saved_tensors, gradient_ND)
        return dependency_gradient, running_gradient, None, None


class Pack(torch.autograd.Function):
    """Copies the finished blocks that cross behind the running sum; in backward, takes the gradients that come back for them."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, running_BTD: Tensor, history: DepthHistory) -> Tensor:
        ctx.history, ctx.part, ctx.shape = history, history.part, running_BTD.shape
        blocks_END = history.entries[history.places_of(history.layout.sent[history.part])]
        payload = torch.cat([running_BTD.flatten(), blocks_END.flatten()])
        return payload.view(*running_BTD.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, size = gradients[0].flatten(), ctx.shape.numel()
        ctx.history.take_sent_gradient(ctx.part, flat[size:].view(-1, *ctx.history.slot_shape))
        return flat.new_zeros(()), flat[:size].view(ctx.shape), None


class Unpack(torch.autograd.Function):
    """Takes received blocks into the history; in backward, after all layers, sends back their gradients."""

    @staticmethod
    def forward(ctx: Any, payload_BTC: Tensor, hidden_size: int, history: DepthHistory) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.part, ctx.payload_shape = history, history.part, payload_BTC.shape
        shape = (*payload_BTC.shape[:2], hidden_size)
        size = payload_BTC.shape[0] * payload_BTC.shape[1] * hidden_size
        if payload_BTC.data_ptr() == history.memory.data_ptr():  # received where it belongs: nothing to copy
            running_BTD = separate_view(history.memory, shape)
            history.take_received(None)
        else:
            flat = payload_BTC.flatten()
            running_BTD = flat[:size].view(shape).clone()
            history.take_received(flat[size:].view(-1, *history.slot_shape))
        return running_BTD, torch.zeros_like(history.dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        running_gradient = gradients[0]
        payload_gradient = running_gradient.new_empty(ctx.payload_shape)
        flat = payload_gradient.view(-1)
        flat[: running_gradient.numel()] = running_gradient.flatten()
        received = flat[running_gradient.numel() :].view(-1, *ctx.history.slot_shape)
        ctx.history.received_gradient(ctx.part, received)
        return payload_gradient, None, None
