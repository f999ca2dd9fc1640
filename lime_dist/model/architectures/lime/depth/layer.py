"""The decoder layer of mixture-of-depths attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.depth.architecture import DepthAttentionLime
from lime_dist.model.architectures.lime.depth.history import DepthKeyValueHistory
from lime_dist.model.blocks import Attention, PreNormLayer
from lime_dist.model.layers import MLP, Positions
from lime_dist.model.recomputation import feed_forward_half
from lime_dist.model.weight_gradients import Projection


class KeyValueMLP(MLP):
    """SwiGLU, with a projection of its input to keys and values that later layers read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.k_proj, self.v_proj = (
            Projection(config.hidden_size, config.key_value_heads * config.head_size) for _ in range(2)
        )


class DepthAttention(Attention):
    """The projections of attention. The mask of documents is a tensor: the backward pass of flex attention takes no logarithms of a
    softmax with further keys."""

    needs_tensor_mask = DepthAttentionLime.needs_tensor_mask


class DepthAttentionLayer(PreNormLayer):
    """Attention and SwiGLU. Attention also reads earlier layers' keys and values at the query's token.

    Args:
        has_mlp_entry: whether later layers read keys and values of the MLP's input.
    """

    compiled_parts: ClassVar[tuple[str, ...]] = ("prepare", "add_attention", "add_mlp")

    def __init__(self, config: ModelConfig, layer: int, has_mlp_entry: bool) -> None:
        super().__init__(config, layer, router=None)
        self.self_attn = DepthAttention(config, router=None)
        if has_mlp_entry:
            self.mlp = KeyValueMLP(config)

    def forward(self, x_BTD: Tensor, history: DepthKeyValueHistory, positions: Positions) -> Tensor:
        assert positions.mask is None or isinstance(positions.mask, Tensor)
        out_BTHd = history.attend(self.layer, *self.prepare(x_BTD, positions), positions.mask)
        x_BTD, normed_BTD, pair = self.add_attention(x_BTD, out_BTHd, positions)
        if pair is not None:
            history.write_mlp(self.layer, *pair)
        return self.add_mlp(x_BTD, normed_BTD)

    def prepare(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d]; rotated keys, and values, [B, G, T, d] each."""
        normed, attention = self.input_layernorm(x_BTD), self.self_attn
        key = attention.keys(attention.split_heads(attention.k_proj(normed)), positions)
        return attention.queries(normed, positions), key, attention.split_heads(attention.v_proj(normed))

    def add_attention(
        self, x_BTD: Tensor, out_BTHd: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The residual stream with the output of attention, the input of the MLP, and its rotated keys and values, if later layers
        read them."""
        attention = self.self_attn
        x_BTD = x_BTD + attention.output(out_BTHd.flatten(2))
        normed, split = self.post_attention_layernorm(x_BTD), attention.split_heads
        if not isinstance(self.mlp, KeyValueMLP):
            return x_BTD, normed, None
        return (
            x_BTD,
            normed,
            (attention.keys(split(self.mlp.k_proj(normed)), positions), split(self.mlp.v_proj(normed))),
        )

    def add_mlp(self, x_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """The residual stream with the output of the MLP."""
        return x_BTD + feed_forward_half(self.mlp, normed_BTD)
