"""Connections with free weights (Hyper-Connections, arXiv 2409.19606)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.model.architectures.hyper.modules.streams import StreamConnection

LAYER_NORM_EPS = 1e-5
"""ε of the LayerNorm of Hyper-Connections, which has no affine part."""


class FreeStreamConnection(StreamConnection):
    """A static part, and with ``dynamic`` one that depends on the token."""

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

    def weights(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        """αᵀ and β."""
        alpha: Tensor = self.static_alpha
        beta: Tensor = self.static_beta
        if self.dynamic:
            normed = layer_norm(streams_BTnD)
            dynamic = torch.tanh(normed @ torch.cat((self.dynamic_alpha, self.dynamic_beta.unsqueeze(-1)), -1))
            alpha = alpha + self.alpha_scale * dynamic[..., :-1]
            beta = beta + self.beta_scale * dynamic[..., -1]
        return alpha.transpose(-1, -2), beta


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension without weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
