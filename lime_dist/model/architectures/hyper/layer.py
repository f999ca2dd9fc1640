"""The decoder layer with Hyper-Connections."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.hyper.connection import Connection
from lime_dist.model.blocks import Attention
from lime_dist.model.layers import MLP, Positions
from lime_dist.model.recomputation import feed_forward_half


class HyperDecoderLayer(nn.Module):
    """Attention and SwiGLU, each with its own pre-norm and connection; [B, T, n, D] -> [B, T, n, D]."""

    compiled_parts: ClassVar[tuple[str, ...]] = ("compute",)

    def __init__(self, config: ModelConfig, connection: Connection) -> None:
        super().__init__()
        self.attn_connection = connection.make()
        self.input_layernorm = connection.make_norm()
        self.self_attn = Attention(config, router=None)
        self.mlp_connection = connection.make()
        self.post_attention_layernorm = connection.make_norm()
        self.mlp = MLP(config)

    def forward(self, streams_BTnD: Tensor, history: None, positions: Positions) -> Tensor:
        return self.compute(streams_BTnD, positions)

    def compute(self, streams_BTnD: Tensor, positions: Positions) -> Tensor:
        """The whole layer as one graph."""

        def attend(x_BTD: Tensor) -> Tensor:
            return self.self_attn(self.input_layernorm(x_BTD), positions)

        def feed_forward(x_BTD: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(x_BTD))

        def second_half(streams_BTnD: Tensor) -> Tensor:
            return cast(Tensor, self.mlp_connection(streams_BTnD, feed_forward))

        return feed_forward_half(second_half, self.attn_connection(streams_BTnD, attend))
