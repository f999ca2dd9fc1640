"""The history of value residual: v_0, the values of the first layer, which all later layers read.

The first layer's v_0 is the memory in which its own attention has it, and a later stage's is part of the payload: nothing is
copied. The autograd graph connects its readers by ``carrier``, a tensor of v_0's shape without memory of its own, whose type is
at least float32: so autograd sums their gradients in that type, and rounds the sum once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory
from lime_dist.model.layout import StageLayout

Factor = Tensor | float


class FirstValues(LayerHistory):
    """v_0 of one micro-batch on one stage.

    Attributes:
        first: v_0 [B, T, G·d], outside of the autograd graph; None until the first layer has run.
    """

    def __init__(self, layout: StageLayout) -> None:
        self.layout, self.is_recomputing = layout, False
        self.first: Tensor | None = None
        self._carrier: Tensor | None = None
        self._kept_gradients: list[Tensor] = []

    def begin_part(self, part: int) -> None:
        self.part = part
        assert self.first is not None
        graph = torch.zeros((), device=self.first.device, requires_grad=torch.is_grad_enabled())
        self._carrier = _Keep.apply(graph, self.first, self)

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        batch, length, width = payload_BTC.shape
        sizes = [batch * length * part for part in (hidden_size, width - hidden_size)]
        hidden, first = (part.view(batch, length, -1) for part in payload_BTC.reshape(-1).split(sizes))
        if self.layout.received[self.part].entries:
            self.write(first)
        return hidden

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Layers apply their weights themselves."""

    def write(self, first_BTC: Tensor) -> None:
        """Take v_0."""
        if not self.is_recomputing:
            self.first, self._carrier = first_BTC.detach(), _Carry.apply(first_BTC, self)

    def mix(self, own_BTC: Tensor, first_factor: Factor, own_factor: Factor) -> Tensor:
        """first_factor · v_0 + own_factor · v_ℓ, [B, T, G·d]."""
        mixed: Tensor = _Mix.apply(self._carrier, self.first, own_BTC, first_factor, own_factor)
        return mixed

    def release(self) -> list[Tensor]:
        carrier = self._carrier
        assert carrier is not None
        self._carrier = carrier.detach()
        return [carrier]

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        if not self.layout.sent[self.part].entries:
            return hidden_BTD.contiguous()
        (carrier,) = released
        first: Tensor = _Send.apply(carrier, self.first)
        batch, length, _ = hidden_BTD.shape
        return torch.cat([hidden_BTD.reshape(-1), first.reshape(-1)]).view(batch, length, -1)

    def keep_gradient(self, gradient: Tensor) -> None:
        """Keep what a later part of the stage adds to the gradient of v_0."""
        self._kept_gradients.append(gradient)

    def whole_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of v_0 with what the later parts of the stage have added.

        Raises:
            RuntimeError: some have not yet.
        """
        kept, later = self._kept_gradients, len(self.layout.parts) - 1
        if len(kept) != later:
            raise RuntimeError(
                f"the gradient of the first values lacks {later - len(kept)} of {later} later parts of the stage"
            )
        return sum(kept, gradient)


class _Carry(torch.autograd.Function):
    """The carrier of v_0's gradient."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, history: FirstValues) -> Tensor:
        ctx.history, ctx.dtype = history, first.dtype
        return _carrier(first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return ctx.history.whole_gradient(gradients[0]).to(ctx.dtype), None


class _Keep(torch.autograd.Function):
    """The carrier for a later part of the stage, which has an autograd graph of its own; in backward, its gradient waits in the
    history."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, first: Tensor, history: FirstValues) -> Tensor:
        ctx.history = history
        return _carrier(first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.history.keep_gradient(gradients[0])
        return gradients[0].new_zeros((), dtype=torch.float32), None, None


def _carrier(first: Tensor) -> Tensor:
    return first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32)).expand(first.shape)


class _Mix(torch.autograd.Function):
    """The weighted sum of v_0 and a layer's own values. It keeps them only where factors are parameters."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, first: Tensor, own: Tensor, first_factor: Factor, own_factor: Factor
    ) -> Tensor:
        ctx.accumulation_dtype, ctx.factors = carrier.dtype, (first_factor, own_factor)
        if isinstance(first_factor, Tensor):
            ctx.factors = None
            ctx.save_for_backward(first_factor, own_factor, first, own)
        return (own * own_factor).add_(first * first_factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient = gradients[0]
        wide = gradient.to(ctx.accumulation_dtype)
        if ctx.factors is not None:
            first_factor, own_factor = ctx.factors
            return wide * first_factor, None, gradient * own_factor, None, None
        first_factor, own_factor, first, own = ctx.saved_tensors
        of_factors = ((wide * values).sum().to(own_factor.dtype) for values in (first, own))
        return wide * first_factor, None, gradient * own_factor, *of_factors


class _Send(torch.autograd.Function):
    """v_0 as a part of the payload."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, first: Tensor) -> Tensor:
        ctx.accumulation_dtype = carrier.dtype
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0].to(ctx.accumulation_dtype), None
