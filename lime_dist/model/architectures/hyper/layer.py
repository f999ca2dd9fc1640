"""The decoder layer with Hyper-Connections (arXiv 2409.19606)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.blocks import Attention
from lime_dist.model.layers import MLP, Rotary

LAYER_NORM_EPS = 1e-5
"""ε of the LayerNorm of Hyper-Connections, which has no affine part."""


class HyperConnection(nn.Module):
    """How a sub-layer reads from and writes to n residual streams (Hyper-Connections, arXiv 2409.19606)."""

    def __init__(self, rate: int, hidden_size: int, dynamic: bool) -> None:
        super().__init__()
        self.static_alpha = nn.Parameter(torch.empty(rate, rate + 1))
        self.static_beta = nn.Parameter(torch.empty(rate))
        self.dynamic = dynamic
        if dynamic:
            self.dynamic_alpha = nn.Parameter(torch.empty(hidden_size, rate + 1))
            self.dynamic_beta = nn.Parameter(torch.empty(hidden_size))
            self.alpha_scale = nn.Parameter(torch.empty(()))
            self.beta_scale = nn.Parameter(torch.empty(()))

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[m_0 | m_1 … m_n] = αᵀ·streams; returns m_i + β_i · sublayer(LN(m_0)) for i = 1 … n."""
        alpha: Tensor = self.static_alpha
        beta: Tensor = self.static_beta
        if self.dynamic:
            normed = layer_norm(streams_BTnD)
            dynamic = torch.tanh(normed @ torch.cat((self.dynamic_alpha, self.dynamic_beta.unsqueeze(-1)), -1))
            alpha = alpha + self.alpha_scale * dynamic[..., :-1]
            beta = beta + self.beta_scale * dynamic[..., -1]
        mixed = alpha.transpose(-1, -2) @ streams_BTnD
        out_BTD = sublayer(layer_norm(mixed[..., 0, :]))
        return mixed[..., 1:, :] + beta.unsqueeze(-1) * out_BTD.unsqueeze(-2)


class HyperDecoderLayer(nn.Module):
    """Attention and SwiGLU, each with its own hyper-connection; [B, T, n, D] -> [B, T, n, D]."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("compute",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rate, dynamic = config.hyper.rate, config.hyper.dynamic
        self.attn_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.self_attn = Attention(config, router=None)
        self.mlp_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, streams_BTnD: Tensor, history: None) -> Tensor:
        return self.compute(streams_BTnD, self.self_attn.rotary(streams_BTnD))

    def compute(self, streams_BTnD: Tensor, rotary: Rotary) -> Tensor:
        """The whole layer as one graph."""
        streams_BTnD = self.attn_connection(streams_BTnD, partial(self.self_attn, rotary=rotary))
        return self.mlp_connection(streams_BTnD, self.mlp)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
