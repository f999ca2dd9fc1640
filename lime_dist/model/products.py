"""The matrix products of the layer history: sums of products in place, and gradients of weights."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 8
PIECE = 512
"""`product_of_rows` on a CPU: up to ``FEW_ROWS`` rows are multiplied as a batch of pieces of ``PIECE`` elements."""


def add_product(weights: Tensor, matrix: Tensor, total: Tensor | None = None) -> Tensor:
    """Add weights @ matrix to ``total``, in place and in the precision of ``total``.

    Args:
        weights: [readers · heads, entries · heads].
        matrix: [entries · heads, elements].
        total: [readers · heads, elements]; None: return the product as a new tensor with the type of ``matrix``.
    """
    if total is None:
        return weights @ matrix
    if total.dtype == matrix.dtype:
        return total.addmm_(weights, matrix)
    if matrix.is_cuda:  # the factors stay in low precision; the product and the sum have that of the total
        return total.add_(torch.mm(weights, matrix, out_dtype=total.dtype))
    return total.addmm_(weights.to(total.dtype), matrix.to(total.dtype))


def product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left @ rightᵀ, [rows of left, rows of right], for matrices with few, very long rows: the gradient of weights.

    On a CPU, order and pieces are those with which PyTorch's MKL is fastest: it is slow when both factors are thin.
    """
    if left.is_cuda:
        return left @ right.t()
    if len(left) > len(right):
        return product_of_rows(right, left).t()
    if len(left) <= FEW_ROWS and left.shape[1] % PIECE == 0:
        pieces = left.view(len(left), -1, PIECE).transpose(0, 1), right.view(len(right), -1, PIECE).permute(1, 2, 0)
        return torch.bmm(*pieces).sum(0)
    return (right @ left.t()).t()
