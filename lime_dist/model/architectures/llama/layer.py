"""The decoder layer of LLaMA."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Rotary


class LlamaLayer(PreNormLayer):
    """Pre-norm attention and SwiGLU, [B, T, D] -> [B, T, D]."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("compute",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, router=None)

    def forward(self, x_BTD: Tensor, history: None) -> Tensor:
        return self.compute(x_BTD, self.self_attn.rotary(x_BTD))

    def compute(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """The whole layer as one graph."""
        q_BHTd, k_BTC, v_BTC = self.project(x_BTD, rotary)
        split = self.self_attn.split_heads
        return self.finish(x_BTD, q_BHTd, split(k_BTC), split(v_BTC), rotary)
