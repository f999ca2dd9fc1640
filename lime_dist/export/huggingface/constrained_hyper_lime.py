"""Hyper-Connections whose residual matrix is doubly stochastic: mHC (arXiv 2512.24880) and mHC-lite (arXiv 2601.05732)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .hyper_lime import HyperLayer
from .hyper_lime import LimeModel as HyperModel
from .layers_lime import RMSNorm
from .modeling_lime import BaseForCausalLM

ROUNDS = 20
LEAST = -60.0
"""Weights that lie farther below the largest of their row count as this far."""


def doubly_stochastic(logits: Tensor, rate: int) -> Tensor:
    """Sinkhorn–Knopp: rows and columns of exp(logits) are divided by their sums in turn; [..., n²] -> [..., n, n]."""
    logits = logits.unflatten(-1, (rate, rate))
    matrix = (logits - logits.amax(-1, keepdim=True)).clamp_min(LEAST).exp()
    for index in range(2 * ROUNDS):
        matrix = matrix / matrix.sum(-1 - index % 2, keepdim=True)
    return matrix


def mixture_of_permutations(logits: Tensor, rate: int) -> Tensor:
    """Σ_k softmax(logits)_k · P_k over all permutations, the identity first; [..., n!] -> [..., n, n]."""
    matrices = torch.eye(rate, dtype=logits.dtype)[torch.tensor(list(permutations(range(rate))))].flatten(1)
    return (logits.softmax(-1) @ matrices.to(logits.device)).unflatten(-1, (rate, rate))


RESIDUALS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int], int]]] = {
    "doubly_stochastic": (doubly_stochastic, lambda rate: rate**2),
    "permutations": (mixture_of_permutations, math.factorial),
}
"""By kind of connection: how its weights become the residual matrix of n streams, and their number."""


class ConstrainedConnection(nn.Module):
    """How a sub-layer reads from and writes to the streams: x becomes H_res·x + H_postᵀ·F(H_pre·x)."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__()
        self.rate, self.eps = config.hyper["rate"], config.rms_norm_eps
        self.residual, count = RESIDUALS[config.hyper["connection"]]
        self.parts = (self.rate, self.rate, count(self.rate))
        self.mapping_proj = nn.Linear(self.rate * config.hidden_size, sum(self.parts), bias=False)
        self.static_bias = nn.Parameter(torch.zeros(sum(self.parts)))
        self.scales = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        accumulation_dtype = torch.promote_types(streams_BTnD.dtype, torch.float32)
        flat = streams_BTnD.flatten(-2)
        inverse = flat.to(accumulation_dtype).square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        products = self.mapping_proj(flat).to(accumulation_dtype) * inverse
        scale = torch.cat([self.scales[i].expand(size) for i, size in enumerate(self.parts)]).to(accumulation_dtype)
        pre, post, residual = (products * scale + self.static_bias.to(accumulation_dtype)).split(self.parts, -1)
        matrix = torch.cat((pre.sigmoid().unsqueeze(-2), self.residual(residual, self.rate)), -2)
        mixed = matrix.to(streams_BTnD.dtype) @ streams_BTnD
        out_BTD = sublayer(mixed[..., 0, :])
        return mixed[..., 1:, :] + (2 * post.sigmoid()).to(out_BTD.dtype).unsqueeze(-1) * out_BTD.unsqueeze(-2)


class ConstrainedLayer(HyperLayer):
    """Its norms have weights."""

    connection = ConstrainedConnection

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_norm(self, x_BTD: Tensor) -> Tensor:
        return self.input_layernorm(x_BTD)

    def mlp_norm(self, x_BTD: Tensor) -> Tensor:
        return self.post_attention_layernorm(x_BTD)


class LimeModel(HyperModel):
    """Token ids to last hidden states."""

    layer_class = ConstrainedLayer


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
