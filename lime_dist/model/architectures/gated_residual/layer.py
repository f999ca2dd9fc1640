"""The decoder layer with gated residuals (arXiv 2608.30320), and the read before the output projection.

With R̂_i = RMSNorm_i(R_i) for each of the n streams R_i, and ⊙ by element:

    read   x = 1/n · Σ_i G_i ⊙ R̂_i      G = σ(W_u · SiLU(W_d · vec(R̂) / n)) ∈ R^{n×D}, W_d ∈ R^{D/8 × nD}, W_u ∈ R^{nD × D/8}
    write  R_i ← R_i + s_i · F(x)       s = 2σ(W_w · vec(R̂) / n) ∈ R^n, W_w ∈ R^{n × nD}

W_d, W_u and W_w are ``compress_proj``, ``expand_proj`` and ``write_proj``. The norms' gains are those of LLaMA, which start at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.blocks import Attention
from lime_dist.model.layers import MLP, Positions
from lime_dist.model.recomputation import feed_forward_half


class GatedRead(nn.Module):
    """Reads the streams, [B, T, n, D] -> [B, T, D]."""

    def __init__(self, rate: int, hidden_size: int, bottleneck: int, eps: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm = StreamNorm(rate, hidden_size, eps)
        self.compress_proj = nn.Linear(rate * hidden_size, bottleneck, bias=False)
        self.expand_proj = nn.Linear(bottleneck, rate * hidden_size, bias=False)

    def read(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the normed streams as one vector per token, [B, T, n·D]."""
        normed_BTnD = self.norm(streams_BTnD)
        vector = normed_BTnD.flatten(-2)
        gates = torch.sigmoid(self.expand_proj(F.silu(self.compress_proj(vector) / self.rate)))
        return (gates.view_as(normed_BTnD) * normed_BTnD).mean(-2), vector


class FinalRead(GatedRead):
    """Stands for the final norm."""

    def forward(self, streams_BTnD: Tensor) -> Tensor:
        return self.read(streams_BTnD)[0]


class GatedConnection(GatedRead):
    """Reads the streams, and adds the sub-layer's output to them."""

    def __init__(self, rate: int, hidden_size: int, bottleneck: int, eps: float) -> None:
        super().__init__(rate, hidden_size, bottleneck, eps)
        self.write_proj = nn.Linear(rate * hidden_size, rate, bias=False)

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        x_BTD, vector = self.read(streams_BTnD)
        gates = 2 * torch.sigmoid(self.write_proj(vector) / self.rate)
        return streams_BTnD + gates.unsqueeze(-1) * sublayer(x_BTD).unsqueeze(-2)


class GatedResidualLayer(nn.Module):
    """Attention and SwiGLU, each with its own connection; [B, T, n, D] -> [B, T, n, D]."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("compute",)

    def __init__(self, config: ModelConfig, rate: int, bottleneck: int) -> None:
        super().__init__()
        sizes = rate, config.hidden_size, bottleneck, config.rms_norm_eps
        self.attn_connection = GatedConnection(*sizes)
        self.self_attn = Attention(config, router=None)
        self.mlp_connection = GatedConnection(*sizes)
        self.mlp = MLP(config)

    def forward(self, streams_BTnD: Tensor, history: None, positions: Positions) -> Tensor:
        return self.compute(streams_BTnD, positions)

    def compute(self, streams_BTnD: Tensor, positions: Positions) -> Tensor:
        """The whole layer as one graph."""

        def attend(x_BTD: Tensor) -> Tensor:
            return self.self_attn(x_BTD, positions)

        def second_half(streams_BTnD: Tensor) -> Tensor:
            return cast(Tensor, self.mlp_connection(streams_BTnD, self.mlp))

        return feed_forward_half(second_half, self.attn_connection(streams_BTnD, attend))


class StreamNorm(nn.Module):
    """RMSNorm of each stream with its own weights, [..., n, D] -> [..., n, D]."""

    def __init__(self, rate: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rate, hidden_size))
        self.eps = eps

    def forward(self, streams: Tensor) -> Tensor:
        return _StreamNorm.apply(streams, self.weight, self.eps)


class _StreamNorm(torch.autograd.Function):
    """Computes in at least float32. It keeps its input and 1 / sqrt(mean(x²) + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        accumulation_dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = x.to(accumulation_dtype).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """With n = x / r for the root mean square r, ∂n = ∂y·weight: ∂x = (∂n − n · mean(∂n · n)) / r, and ∂weight = Σ ∂y · n."""
        x, weight, inverse = ctx.saved_tensors
        normed, gradient = x * inverse, gradients[0] * weight.to(inverse.dtype)
        weight_gradient = (gradients[0] * normed).flatten(0, -3).sum(0).to(weight.dtype)
        mean = (gradient * normed).mean(-1, keepdim=True)
        return gradient.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), weight_gradient, None
