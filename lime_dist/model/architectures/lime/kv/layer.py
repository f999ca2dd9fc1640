"""The decoder layer of LIMe over keys and values."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.kv.history import KeyValueHistory
from lime_dist.model.architectures.lime.kv.router import KeyValueRouter
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.layers import Positions
from lime_dist.model.policies import Entry


class KeyValueLayer(PreNormLayer):
    """The layer mixes its keys and values with those of earlier layers before rotation. Layer 0 has no router."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("project", "finish")

    def __init__(self, config: ModelConfig, layer: int, reads: tuple[Entry, ...]) -> None:
        super().__init__(config, layer, KeyValueRouter(config.key_value_heads, reads) if reads else None)

    def forward(self, x_BTD: Tensor, history: KeyValueHistory, positions: Positions) -> Tensor:
        attention = self.self_attn
        q_BHTd, k_BTC, v_BTC = self.project(x_BTD, positions)
        batch, length, _ = x_BTD.shape
        k_NGd, v_NGd = (t.view(batch * length, -1, attention.head_size) for t in (k_BTC, v_BTC))
        mixed = history.mix(self.layer, k_NGd, v_NGd)
        k_BGTd, v_BGTd = (t.view(-1, batch, length, attention.head_size).transpose(0, 1) for t in mixed)
        return self.finish(x_BTD, q_BHTd, k_BGTd, v_BGTd, positions)
