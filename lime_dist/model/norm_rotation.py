"""RMSNorm and rotation as autograd Functions: few operations, and nothing kept for backward that can be computed again.

Autograd would record each of their steps: two to three times the operations in backward, and for a bf16 norm a float32 copy of
its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, computed in at least float32 and rounded once.

    On CUDA torch has a kernel for it, and one for its backward; both keep what the Function here keeps.
    """
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and 1 / sqrt(mean(x²) + ε), in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        accumulation_dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = x.to(accumulation_dtype).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed = x * inverse
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """With n = x / r for the root mean square r, ∂n = ∂y·weight: ∂x = (∂n − n · mean(∂n · n)) / r, and ∂weight = Σ ∂y · n."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        products = gradients[0] * normed
        weight_gradient = None
        if weight is None:
            mean = products.mean(-1, keepdim=True)
            gradient = gradients[0].to(products.dtype, copy=True)
        else:
            weight_gradient = products.flatten(0, -2).sum(0).to(weight.dtype)
            scale = weight.to(products.dtype)
            mean = (products @ scale).div_(x.shape[-1]).unsqueeze_(-1)
            gradient = gradients[0] * scale
        return gradient.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), weight_gradient, None


class Rotate(torch.autograd.Function):
    """Rotates pairs (i, i + d/2) of the last dimension d; backward rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """x rotated by the angles of the table, or by their negatives (``direction`` −1), computed in the table's type."""
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return rotated.to(x.dtype)
