"""The decoder layer of attention residuals."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.attention_residuals.blocks import Blocks
from lime_dist.model.architectures.attention_residuals.history import DepthHistory
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Positions, RMSNorm
from lime_dist.model.recomputation import feed_forward_half


class DepthQuery(nn.Module):
    """The pseudo-query w of a sub-layer, and the weight γ of the norm of its keys."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(size))
        self.key_layernorm = RMSNorm(size, eps)

    def forward(self) -> Tensor:
        """w ⊙ γ, [D]: its product with v / rms(v) is wᵀ·RMSNorm(v)."""
        return self.query * self.key_layernorm.weight


class AttentionResidualsLayer(PreNormLayer):
    """Attention and SwiGLU, which read a softmax over the outputs of earlier blocks. The hidden state that the layer takes and
    returns, [B, T, D], is the running sum of the block that is not finished; the last layer returns the last read.

    Args:
        reads_last: whether this is the last layer.
    """

    compiled_parts: ClassVar[tuple[str, ...]] = ("attend", "add_feed_forward")

    def __init__(self, config: ModelConfig, layer: int, blocks: Blocks, reads_last: bool) -> None:
        super().__init__(config, layer, router=None)
        self.blocks = blocks
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attn_residual = DepthQuery(size, eps) if layer > 0 else None  # sub-layer 0 reads the embedding alone
        self.mlp_residual = DepthQuery(size, eps)
        self.output_residual = DepthQuery(size, eps) if reads_last else None

    def routing(self) -> Tensor:
        """The queries of the layer's reads, [reads, D]."""
        queries = (self.attn_residual, self.mlp_residual, self.output_residual)
        return torch.stack([query() for query in queries if query is not None])

    def forward(self, x_BTD: Tensor, history: DepthHistory, positions: Positions) -> Tensor:
        sublayer = 2 * self.layer
        mixed_BTD = history.read(sublayer, x_BTD)
        x_BTD = self.attend(mixed_BTD, None if self.blocks.begins(sublayer) else x_BTD, positions)
        mixed_BTD = history.read(sublayer + 1, x_BTD)
        x_BTD = self.add_feed_forward(mixed_BTD, None if self.blocks.begins(sublayer + 1) else x_BTD)
        return x_BTD if self.output_residual is None else history.read(sublayer + 2, x_BTD)

    def attend(self, mixed_BTD: Tensor, running_BTD: Tensor | None, positions: Positions) -> Tensor:
        """The output of attention, added to the running sum of its block."""
        out_BTD = self.self_attn(self.input_layernorm(mixed_BTD), positions)
        return out_BTD if running_BTD is None else running_BTD + out_BTD

    def add_feed_forward(self, mixed_BTD: Tensor, running_BTD: Tensor | None) -> Tensor:
        """The output of SwiGLU, added to the running sum of its block."""
        out_BTD = feed_forward_half(self.feed_forward, mixed_BTD)
        return out_BTD if running_BTD is None else running_BTD + out_BTD
