"""The decoder layer of LLaMA."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Positions


class LlamaLayer(PreNormLayer):
    """Pre-norm attention and SwiGLU, [B, T, D] -> [B, T, D]."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("compute",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, router=None)

    def forward(self, x_BTD: Tensor, history: None, positions: Positions) -> Tensor:
        return self.compute(x_BTD, positions)

    def compute(self, x_BTD: Tensor, positions: Positions) -> Tensor:
        """The whole layer as one graph."""
        q_BHTd, k_BTC, v_BTC = self.project(x_BTD, positions)
        split = self.self_attn.split_heads
        return self.finish(x_BTD, q_BHTd, split(k_BTC), split(v_BTC), positions)
