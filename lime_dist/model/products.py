"""The matrix products of the layer history: sums of products in place, and gradients of weights."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 8
PIECE = 512
"""`product_of_rows` on a CPU: up to ``FEW_ROWS`` rows are multiplied as a batch of pieces of ``PIECE`` elements."""
SPLIT = 1 << 15
"""`product_of_rows` on a GPU: elements of the pieces whose products are summed in float32. Millions of elements give enough
pieces to keep the whole GPU busy, although the product itself has few elements."""


def product(weights: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """weights @ matrix with the type of the factors, in ``out`` if given. Every element is summed in at least float32 and rounded
    once."""
    return torch.mm(weights, matrix, out=out)


def add_product(weights: Tensor, matrix: Tensor, total: Tensor) -> Tensor:
    """Add weights @ matrix to ``total``, in place and in the precision of ``total``.

    Args:
        weights: [readers · heads, entries · heads].
        matrix: [entries · heads, elements].
        total: [readers · heads, elements].
    """
    if total.dtype == matrix.dtype:
        return total.addmm_(weights, matrix)
    if matrix.device.type != "cpu":  # the factors stay in low precision; the product and the sum have that of the total
        return total.add_(torch.mm(weights, matrix, out_dtype=total.dtype))
    return total.addmm_(weights.to(total.dtype), matrix.to(total.dtype))


def product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left @ rightᵀ, [rows of left, rows of right], for matrices with few, very long rows: the gradient of weights.

    On a CPU, order and pieces are those with which PyTorch's MKL is fastest: it is slow when both factors are thin. Elsewhere
    the result is in at least float32, as `split_product` computes it.
    """
    if left.device.type != "cpu":
        return split_product(left, right, SPLIT)
    if len(left) > len(right):
        return product_of_rows(right, left).t()
    if len(left) <= FEW_ROWS and left.shape[1] % PIECE == 0:
        pieces = left.view(len(left), -1, PIECE).transpose(0, 1), right.view(len(right), -1, PIECE).permute(1, 2, 0)
        return torch.bmm(*pieces).sum(0)
    return (right @ left.t()).t()


def split_product(left: Tensor, right: Tensor, size: int) -> Tensor:
    """left @ rightᵀ as a sum of products of pieces of ``size`` columns. The factors keep their type; products and sum are in at
    least float32, so that nothing is rounded to low precision, neither a partial sum nor the result.

    Args:
        left, right: [rows, columns] each, with as many columns.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    whole = left.shape[1] - left.shape[1] % size
    pieces = (
        left[:, :whole].unflatten(1, (-1, size)).transpose(0, 1),
        right[:, :whole].unflatten(1, (-1, size)).permute(1, 2, 0),
    )
    total = batched_product(*pieces, dtype).sum(0)
    if whole < left.shape[1]:
        total += batched_product(left[None, :, whole:], right[None, :, whole:].mT, dtype)[0]
    return total


def batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.bmm with sums and result in ``dtype``. Elsewhere than on a CPU, factors of lower precision are not converted."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    if left.device.type != "cpu":
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


def mixed_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A batch of products of factors of different precision, with sums and result in ``dtype``. The factors take the lower
    precision of the two, unless this is a CPU."""
    factor = dtype if left.device.type == "cpu" else min(left.dtype, right.dtype, key=lambda one: one.itemsize)
    return batched_product(left.to(factor), right.to(factor), dtype)
