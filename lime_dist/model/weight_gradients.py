"""The weight gradients of projections, apart from the rest of a backward pass: nobody waits for them, so they can come later.

In backward a projection y = x·Wᵀ owes two products: ∂x = ∂y·W, which earlier layers and stages wait for, and ∂W = ∂yᵀ·x. A forward
pass within `deferring` leaves the second one to a queue (`WeightGradients`), which keeps x and ∂y until its turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.model.products import add_product


class _Product(NamedTuple):
    weight: Tensor
    input_NC: Tensor
    gradient_NC: Tensor


class WeightGradients:
    """The weight gradients of one micro-batch on one stage that are not computed yet.

    Attributes:
        active: where projections that run now leave their weight gradients; None: backward computes them at once.
    """

    active: ClassVar[WeightGradients | None] = None

    def __init__(self) -> None:
        self._products: deque[_Product] = deque()

    def __len__(self) -> int:
        return len(self._products)

    def add(self, weight: Tensor, input_NC: Tensor, gradient_NC: Tensor) -> None:
        """Keep what the gradient of a weight is made from: the input and the gradient of the output, rows by token."""
        self._products.append(_Product(weight, input_NC, gradient_NC))

    def holds(self, weight: Tensor) -> bool:
        """Whether a gradient of a weight is left."""
        return any(product.weight is weight for product in self._products)

    @torch.no_grad()
    def compute_next(self, gradient_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the first one that is left to the gradient of its weight, and free what it was made from. They come in the order in
        which backward came to them.

        Args:
            gradient_of: the accumulated gradient of a weight, in the weight's shape.

        Returns:
            The weight.
        """
        weight, input_NC, gradient_NC = self._products.popleft()
        add_product(gradient_NC.t(), input_NC, gradient_of(weight))
        return weight


@contextmanager
def deferring(gradients: WeightGradients | None) -> Iterator[None]:
    """Within, projections leave their weight gradients to ``gradients``; None: backward computes them at once."""
    before, WeightGradients.active = WeightGradients.active, gradients
    try:
        yield
    finally:
        WeightGradients.active = before


class Projection(nn.Linear):
    """x·Wᵀ, whose weight gradient can be deferred."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if WeightGradients.active is None:
            return F.linear(x, self.weight)
        result: Tensor = _Deferred.apply(x, self, WeightGradients.active)
        return result


class _Deferred(torch.autograd.Function):
    """Keeps its input, as `F.linear` does. For autograd the weight is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x.detach().flatten(0, -2))  # not x: it would hold the graph until the weight pass
        ctx.weight, ctx.gradients = projection.weight, gradients
        return F.linear(x, projection.weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (input_NC,) = ctx.saved_tensors
        gradient_NC = gradients[0].flatten(0, -2)
        ctx.gradients.add(ctx.weight, input_NC, gradient_NC)
        return (gradient_NC @ ctx.weight).view(*gradients[0].shape[:-1], -1), None, None
