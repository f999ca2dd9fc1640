"""Sinkhorn–Knopp: a doubly stochastic matrix near the exponential of a given one (arXiv 2512.24880)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDS = 20
"""The paper's number: each divides the rows by their sums, then the columns."""
LEAST = -60.0
"""Weights that lie farther below the largest of their row count as this far: otherwise a column's sum could underflow to 0."""


def doubly_stochastic(logits: Tensor, rate: int) -> Tensor:
    """[..., n²] -> [..., n, n]."""
    matrix: Tensor = _Sinkhorn.apply(logits.unflatten(-1, (rate, rate)))
    return matrix


class _Sinkhorn(torch.autograd.Function):
    """Keeps its input alone; backward computes the iterations again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return _iterate(logits)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """In logarithms, log M' = log M − log s with the row or column sums s of M: ∂log M = ∂log M' − M' · Σ ∂log M', and M = M' · s.
        The first log M is the input."""
        (logits,) = ctx.saved_tensors
        matrix, sums = _iterate(logits)
        gradient = gradients[0] * matrix
        for index in reversed(range(len(sums))):
            gradient = gradient - matrix * gradient.sum(_dimension(index), keepdim=True)
            matrix = matrix * sums[index]
        return gradient.masked_fill(_shifted(logits) < LEAST, 0)


def _iterate(logits: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The matrix, and the sums by which rows and columns were divided."""
    matrix, sums = _shifted(logits).clamp_min(LEAST).exp(), []
    for index in range(2 * ROUNDS):
        sums.append(matrix.sum(_dimension(index), keepdim=True))
        matrix = matrix / sums[-1]
    return matrix, sums


def _shifted(logits: Tensor) -> Tensor:
    """A shift of a row changes nothing in the result, and avoids overflow."""
    return logits - logits.amax(-1, keepdim=True)


def _dimension(index: int) -> int:
    """Rows are divided in even steps."""
    return -1 if index % 2 == 0 else -2
