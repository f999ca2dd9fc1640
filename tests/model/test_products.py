"""Protects the products of the layer history against low precision."""

from __future__ import annotations

import pytest
import torch

from lime_dist.model.products import SPLIT, split_product


@pytest.mark.parametrize("columns", [1 << 21, (1 << 21) + 300, 300])
def test_long_bf16_products_are_float32_sums(columns: int) -> None:
    """With millions of columns. A result that is rounded to bf16, as `left @ right.t()` is, is off by 2⁻⁹."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, columns, generator=generator).bfloat16() for rows in (2, 6))
    exact = left.double() @ right.double().t()
    scale = exact.abs().amax()
    rounded = (exact.bfloat16().double() - exact).abs().amax() / scale
    product = split_product(left, right, SPLIT)
    assert product.dtype == torch.float32
    assert (product.double() - exact).abs().amax() / scale < rounded / 100


@pytest.mark.parametrize("size", [64, 1000, 4096])
def test_a_split_product_keeps_double_precision(size: int) -> None:
    left, right = torch.randn(3, 1000, dtype=torch.float64), torch.randn(5, 1000, dtype=torch.float64)
    torch.testing.assert_close(split_product(left, right, size), left @ right.t(), rtol=1e-12, atol=1e-12)
