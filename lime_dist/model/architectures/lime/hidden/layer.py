"""The decoder layer of LIMe over hidden states."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.hidden.history import HiddenHistory
from lime_dist.model.architectures.lime.hidden.router import DynamicRouter
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Positions, RMSNorm
from lime_dist.model.norm_rotation import rms_norm


class HiddenLayer(PreNormLayer):
    """The layer writes its input to the history. If it has a router, each head projects its keys and values from its own
    mixture of entries."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("prepare", "finish")

    def __init__(self, config: ModelConfig, layer: int, router: nn.Module | None) -> None:
        super().__init__(config, layer, router)
        if router is not None:
            self.history_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, history: HiddenHistory, positions: Positions) -> Tensor:
        attention = self.self_attn
        state_BTD, normed_BTD, q_BHTd = self.prepare(x_BTD, positions)
        history.write(self.layer, state_BTD.flatten(0, 1), x_BTD.flatten(0, 1))
        if attention.router is None:
            k_BHTd, v_BHTd = (attention.split_heads(p(normed_BTD)) for p in (attention.k_proj, attention.v_proj))
        else:
            k_BHTd, v_BHTd = self.read(state_BTD, history)
        return self.finish(x_BTD, q_BHTd, k_BHTd, v_BHTd, positions)

    def prepare(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """The input divided by its root mean square, the normed input (both [B, T, D]), and rotated queries [B, H, T, d]."""
        state_BTD = rms_norm(x_BTD, None, self.input_layernorm.eps)
        normed_BTD = state_BTD * self.input_layernorm.weight
        return state_BTD, normed_BTD, self.self_attn.queries(normed_BTD, positions)

    def read(self, state_BTD: Tensor, history: HiddenHistory) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, d], projected from mixtures of entries after the layer's history norm."""
        attention, gamma = self.self_attn, self.history_layernorm.weight
        batch, length, _ = state_BTD.shape
        weights = None
        if isinstance(attention.router, DynamicRouter):
            weights = attention.router((state_BTD * gamma).flatten(0, 1))
        projections_HcD = torch.cat(
            [p.weight.unflatten(0, (-1, attention.head_size)) for p in (attention.k_proj, attention.v_proj)], dim=1
        )
        projected_HNc = history.project(self.layer, weights, projections_HcD * gamma)
        key, value = projected_HNc.view(-1, batch, length, 2, attention.head_size).transpose(0, 1).unbind(3)
        return key, value
