"""Decoder layers: LLaMA and LIMe. A layer takes and returns the hidden state [B, T, D] and may use the layer history."""

from __future__ import annotations

from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.history import HistoryPolicy, KeyValueHistory
from lime_dist.model.layers import MLP, RMSNorm, causal_attention, rotate
from lime_dist.model.routing import KeyValueRouter


class Attention(nn.Module):
    """Grouped-query causal attention with rotary embedding; with a history, keys and values are mixed over layers first."""

    def __init__(self, config: ModelConfig, layer: int, policy: HistoryPolicy | None) -> None:
        super().__init__()
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_size
        key_value_heads = config.key_value_heads
        self.layer, self.head_size, self.rope_theta = layer, size, config.rope_theta
        self.q_proj = nn.Linear(hidden, heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)
        self.router = None
        if policy is not None and layer > 0:
            self.router = KeyValueRouter(key_value_heads, len(policy.reads(layer)))

    def forward(self, x_BTD: Tensor, history: KeyValueHistory | None) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BHTd = self.q_proj(x_BTD).view(batch, length, -1, self.head_size).transpose(1, 2)
        k = self.k_proj(x_BTD)
        v = self.v_proj(x_BTD)
        if history is None:
            k_BGTd = k.view(batch, length, -1, self.head_size).transpose(1, 2)
            v_BGTd = v.view(batch, length, -1, self.head_size).transpose(1, 2)
        else:
            k_NGd, v_NGd = (t.view(batch * length, -1, self.head_size) for t in (k, v))
            k_GNd, v_GNd = history.mix(self.layer, k_NGd, v_NGd)
            k_BGTd, v_BGTd = (t.view(-1, batch, length, self.head_size).transpose(0, 1) for t in (k_GNd, v_GNd))
        mixed = causal_attention(rotate(q_BHTd, self.rope_theta), rotate(k_BGTd, self.rope_theta), v_BGTd)
        return self.o_proj(mixed)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, policy: HistoryPolicy | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, policy)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, history: KeyValueHistory | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), history)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
