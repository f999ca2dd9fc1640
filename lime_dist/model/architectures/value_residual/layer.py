"""The decoder layer of value residual."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.value_residual.history import FirstValues
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Positions


class ValueRouter(nn.Module):
    """The learnable factors of v_0 and of the layer's own values, [2]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def factors(self) -> tuple[Tensor, ...]:
        return self.weight.unbind()

    def matrix(self) -> None:
        """The layer applies them itself."""


class ValueResidualLayer(PreNormLayer):
    """Pre-norm attention and SwiGLU; from layer 1 on, attention reads a sum of the first layer's values and its own."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("project", "finish")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        settings = config.value_residual
        super().__init__(config, layer, ValueRouter() if settings.learnable and layer > 0 else None)
        self.factors = settings.weight, 1 - settings.weight

    def forward(self, x_BTD: Tensor, history: FirstValues, positions: Positions) -> Tensor:
        split = self.self_attn.split_heads
        q_BHTd, k_BTC, v_BTC = self.project(x_BTD, positions)
        if self.layer == 0:
            history.write(v_BTC)
        else:
            router = self.self_attn.router
            v_BTC = history.mix(v_BTC, *(router.factors() if isinstance(router, ValueRouter) else self.factors))
        return self.finish(x_BTD, q_BHTd, split(k_BTC), split(v_BTC), positions)
