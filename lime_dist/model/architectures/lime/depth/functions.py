"""The autograd Functions of `DepthKeyValueHistory`: what writes and reads keys and values, and in which order backward does.

Each takes the ``dependency`` of the operation before it and returns one for the next (see `history.py`). They hold the history, do
nothing themselves, and call its public methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lime_dist.model.chunks import Chunk

if TYPE_CHECKING:
    from lime_dist.model.architectures.lime.depth.history import DepthKeyValueHistory


class Attend(torch.autograd.Function):
    """Writes a layer's keys and values, and attends to them and to those of earlier layers. Autograd keeps queries, output and the
    logarithms of sums of exponentials; keys and values stay in the history."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None,
        history: DepthKeyValueHistory, layer: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.history, ctx.layer, ctx.mask = history, layer, mask
        history.write_slot(layer, k_BGTd, v_BGTd)
        out_BTHd, sums_BTH, ctx.state = history.attended(layer, q_BHTd, mask)
        ctx.save_for_backward(q_BHTd, out_BTHd, sums_BTH)
        return out_BTHd, torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient_BTHd, dependency_gradient = gradients
        # All newer layers have been visited: autograd runs their backward first, because they depend on this one.
        own = ctx.history.visit(ctx.layer, *ctx.saved_tensors, ctx.mask, ctx.state, gradient_BTHd)
        return dependency_gradient, *own, None, None, None


class WriteMlp(torch.autograd.Function):
    """Writes the keys and values of a layer's MLP; in backward, after all of their readers, returns their gradients."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, history: DepthKeyValueHistory, layer: int
    ) -> Tensor:
        ctx.history, ctx.layer, ctx.batch = history, layer, len(k_BGTd)
        history.write_mlp_pair(layer, k_BGTd, v_BGTd)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], *ctx.history.mlp_gradients(ctx.layer, ctx.batch), None, None


class Summarise(torch.autograd.Function):
    """Writes a chunk's summary; in backward, after all of its readers, gives its gradient to the chunk's slots and weights."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, weights: Tensor, history: DepthKeyValueHistory, chunk: Chunk) -> Tensor:
        ctx.history, ctx.chunk = history, chunk
        ctx.save_for_backward(weights)
        history.write_summary(chunk, weights)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (weights,) = ctx.saved_tensors
        return gradients[0], ctx.history.visit_summary(ctx.chunk, weights), None, None
