"""Decoder layers: LLaMA, LIMe over keys and values, LIMe over hidden states, Hyper-Connections.

A layer takes and returns the hidden state, [B, T, D] ([B, T, n, D] with n streams), and may use the layer history.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.hidden_history import HiddenHistory
from lime_dist.model.history import LayerHistory, make_policy
from lime_dist.model.key_value_history import KeyValueHistory
from lime_dist.model.layers import MLP, RMSNorm, causal_attention, rms_normalise, rotate
from lime_dist.model.routing import DynamicRouter, KeyValueRouter, StaticRouter

LAYER_NORM_EPS = 1e-5
"""ε of the LayerNorm without affine part that Hyper-Connections use."""


class Attention(nn.Module):
    """Grouped-query causal attention with rotary embedding; where keys and values come from is the subclasses'."""

    router: nn.Module | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = None
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_size
        self.head_size, self.rope_theta = size, config.rope_theta
        self.q_proj = nn.Linear(hidden, heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.attend(x_BTD, self.split_heads(self.k_proj(x_BTD)), self.split_heads(self.v_proj(x_BTD)))

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """[B, T, G·d] -> [B, G, T, d]."""
        return x_BTC.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def attend(self, x_BTD: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Queries of x attend to keys (before rotation) and values; returns [B, T, D]."""
        q_BHTd = self.split_heads(self.q_proj(x_BTD))
        mixed = causal_attention(rotate(q_BHTd, self.rope_theta), rotate(k_BGTd, self.rope_theta), v_BGTd)
        return self.o_proj(mixed)


class KeyValueAttention(Attention):
    """LIMe's second version: a layer's keys and values are mixed with those of earlier layers, before rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.layer = layer
        if layer > 0:
            self.router = KeyValueRouter(config.key_value_heads, len(make_policy(config.lime).reads(layer)))

    def forward(self, x_BTD: Tensor, history: KeyValueHistory) -> Tensor:  # type: ignore[override]  # reads a history
        batch, length, _ = x_BTD.shape
        k_NGd, v_NGd = (
            projection(x_BTD).view(batch * length, -1, self.head_size) for projection in (self.k_proj, self.v_proj)
        )
        mixed = history.mix(self.layer, k_NGd, v_NGd)
        k_BGTd, v_BGTd = (t.view(-1, batch, length, self.head_size).transpose(0, 1) for t in mixed)
        return self.attend(x_BTD, k_BGTd, v_BGTd)


class HiddenAttention(Attention):
    """LIMe's first version: each head's key and value are projected from its own mixture of residual-stream states."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.layer = layer
        heads, read = config.num_attention_heads, len(make_policy(config.lime).reads(layer))
        if layer >= config.lime.start_layer:
            if config.lime.router == "dynamic":
                self.router = DynamicRouter(heads, read, config.hidden_size)
            else:
                self.router = StaticRouter(heads, read, config.lime.top_p)

    def read(self, x_BTD: Tensor, state_BTD: Tensor, history_weight: Tensor, history: HiddenHistory) -> Tensor:
        """Queries from x; keys and values from the history under the norm weight γ [D].

        Args:
            state_BTD: this layer's input divided by its root mean square; it is in the history already.
        """
        assert self.router is not None
        batch, length, _ = x_BTD.shape
        weights = self.router((state_BTD * history_weight).flatten(0, 1))
        projections_HcD = torch.cat(
            [p.weight.unflatten(0, (-1, self.head_size)) for p in (self.k_proj, self.v_proj)], dim=1
        )
        projected_HNc = history.project(self.layer, weights, projections_HcD * history_weight)
        k_BHTd, v_BHTd = projected_HNc.view(-1, batch, length, 2, self.head_size).transpose(0, 1).unbind(3)
        return self.attend(x_BTD, k_BHTd, v_BHTd)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream: LLaMA, and LIMe over keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = KeyValueAttention(config, layer) if config.architecture == "lime" else Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, history: LayerHistory | None) -> Tensor:
        normed = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + (self.self_attn(normed) if history is None else self.self_attn(normed, history))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class HiddenDecoderLayer(nn.Module):
    """LIMe over hidden states: the layer's input goes into the history; from ``start_layer`` on, attention reads it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = HiddenAttention(config, layer)
        if self.self_attn.router is not None:
            self.history_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, history: HiddenHistory) -> Tensor:
        state = rms_normalise(x_BTD, self.input_layernorm.eps)
        history.write(self.layer, state.flatten(0, 1))
        normed = state * self.input_layernorm.weight
        if self.self_attn.router is None:
            x_BTD = x_BTD + self.self_attn(normed)
        else:
            x_BTD = x_BTD + self.self_attn.read(normed, state, self.history_layernorm.weight, history)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class HyperConnection(nn.Module):
    """How one sub-layer reads from and writes to n residual streams (Hyper-Connections, arXiv 2409.19606)."""

    def __init__(self, rate: int, hidden_size: int, dynamic: bool) -> None:
        super().__init__()
        self.static_alpha = nn.Parameter(torch.empty(rate, rate + 1))
        self.static_beta = nn.Parameter(torch.empty(rate))
        self.dynamic = dynamic
        if dynamic:
            self.dynamic_alpha = nn.Parameter(torch.empty(hidden_size, rate + 1))
            self.dynamic_beta = nn.Parameter(torch.empty(hidden_size))
            self.alpha_scale = nn.Parameter(torch.empty(()))
            self.beta_scale = nn.Parameter(torch.empty(()))

    def forward(self, streams_BTnD: Tensor, sublayer: nn.Module) -> Tensor:
        """[m_0 | m_1 … m_n] = αᵀ·streams; the sub-layer's output on LN(m_0), times β, is added to m_1 … m_n."""
        alpha: Tensor = self.static_alpha
        beta: Tensor = self.static_beta
        if self.dynamic:
            normed = layer_norm(streams_BTnD)
            alpha = alpha + self.alpha_scale * torch.tanh(normed @ self.dynamic_alpha)
            beta = beta + self.beta_scale * torch.tanh(normed @ self.dynamic_beta)
        mixed = alpha.transpose(-1, -2) @ streams_BTnD
        out_BTD = sublayer(layer_norm(mixed[..., 0, :]))
        return mixed[..., 1:, :] + beta.unsqueeze(-1) * out_BTD.unsqueeze(-2)


class HyperDecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind a Hyper-Connection of its own; [B, T, n, D] -> [B, T, n, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rate, dynamic = config.hyper.rate, config.hyper.dynamic
        self.attn_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.self_attn = Attention(config)
        self.mlp_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, streams_BTnD: Tensor, history: None) -> Tensor:
        streams_BTnD = self.attn_connection(streams_BTnD, self.self_attn)
        return self.mlp_connection(streams_BTnD, self.mlp)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def make_layer(config: ModelConfig, layer: int) -> nn.Module:
    """Decoder layer ``layer`` of the architecture that a configuration names."""
    if config.architecture == "hyper":
        return HyperDecoderLayer(config)
    if config.architecture == "lime" and config.lime.routes == "hidden":
        return HiddenDecoderLayer(config, layer)
    return DecoderLayer(config, layer)
