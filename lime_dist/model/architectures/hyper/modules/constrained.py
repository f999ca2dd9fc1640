"""Connections with constrained weights: `lime_dist.model.architectures.hyper.constrained` has the equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lime_dist.model.architectures.hyper.modules.streams import StreamConnection


class ConstrainedStreamConnection(StreamConnection):
    """All weights of a token are one product with its streams, computed in at least float32 from there on.

    Args:
        num_logits: number of weights from which the residual matrix is made.
        residual: makes the matrix [..., n, n] from weights [..., num_logits] and n.
    """

    def __init__(
        self, rate: int, hidden_size: int, num_logits: int, eps: float, residual: Callable[[Tensor, int], Tensor]
    ) -> None:
        super().__init__()
        self.parts, self.eps, self.residual = (rate, rate, num_logits), eps, residual
        self.mapping_proj = nn.Linear(rate * hidden_size, sum(self.parts), bias=False)
        self.static_bias = nn.Parameter(torch.empty(sum(self.parts)))
        self.scales = nn.Parameter(torch.empty(3))

    def weights(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        """[H_pre; H_res] and H_post. The product is divided by the root mean square afterwards, so that no normed streams are kept."""
        rate, dtype = self.parts[0], streams_BTnD.dtype
        accumulation_dtype = torch.promote_types(dtype, torch.float32)
        flat = streams_BTnD.flatten(-2)
        products = self.mapping_proj(flat).to(accumulation_dtype) * InverseRMS.apply(flat, self.eps)
        scales = self.scales.to(accumulation_dtype)
        scale = torch.cat([scales[i].expand(size) for i, size in enumerate(self.parts)])
        z = torch.addcmul(self.static_bias.to(accumulation_dtype), products, scale)
        gates = torch.sigmoid(z[..., : 2 * rate])
        matrix = torch.cat((gates[..., None, :rate], self.residual(z[..., 2 * rate :], rate)), -2)
        return matrix.to(dtype), (2 * gates[..., rate:]).to(dtype)


class InverseRMS(torch.autograd.Function):
    """1 / sqrt(mean(x²) + ε) over the last dimension, [..., 1], in at least float32. It keeps its input and its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        accumulation_dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = x.to(accumulation_dtype).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """∂x = −∂y · y³ · x / size."""
        x, inverse = ctx.saved_tensors
        factor = gradients[0] * inverse.pow(3) / -x.shape[-1]
        return (x * factor).to(x.dtype), None
