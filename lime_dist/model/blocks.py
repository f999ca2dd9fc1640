"""Decoder layers: LLaMA, LIMe over keys and values, LIMe over hidden states, Hyper-Connections.

A layer takes and returns the hidden state, [B, T, D] ([B, T, n, D] with n streams), and may use the layer history. A layer
with a history has two parts, ``before`` it and ``after`` it; without one it runs ``alone``. These `compile_layers` compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError
from lime_dist.model.hidden_history import HiddenHistory
from lime_dist.model.key_value_history import KeyValueHistory
from lime_dist.model.layers import MLP, RMSNorm, Rotary, causal_attention, rms_normalise, rotary_table, rotate
from lime_dist.model.policies import make_policy
from lime_dist.model.routing import DynamicRouter, KeyValueRouter, Router, StaticRouter

LAYER_NORM_EPS = 1e-5
"""ε of the LayerNorm without affine part that Hyper-Connections use."""


class Attention(nn.Module):
    """Grouped-query causal attention with rotary embedding, and the router of the layer, where it has one."""

    router: Router | None

    def __init__(self, config: ModelConfig, router: Router | None) -> None:
        super().__init__()
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_size
        self.head_size, self.rope_theta = size, config.rope_theta
        self.q_proj = nn.Linear(hidden, heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)
        self.router = router

    def rotary(self, x_BTD: Tensor) -> Rotary:
        """The table for a hidden state, with streams or without."""
        return rotary_table(x_BTD.shape[1], self.head_size, self.rope_theta, x_BTD.dtype, x_BTD.device)

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """[B, T, G·d] -> [B, G, T, d]."""
        return x_BTC.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def queries(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries, [B, H, T, d]."""
        return rotate(self.split_heads(self.q_proj(x_BTD)), rotary)

    def attend(self, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries attend to keys (before rotation) and values; returns [B, T, D]."""
        return self.o_proj(causal_attention(q_BHTd, rotate(k_BGTd, rotary), v_BGTd))

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """Attention without a history."""
        key, value = self.split_heads(self.k_proj(x_BTD)), self.split_heads(self.v_proj(x_BTD))
        return self.attend(self.queries(x_BTD, rotary), key, value, rotary)


class PreNormLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream; what comes first is the subclasses'."""

    def __init__(self, config: ModelConfig, layer: int, router: Router | None) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, router)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def before(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """What needs no history."""
        raise NotImplementedError

    def after(self, x_BTD: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, rotary: Rotary) -> Tensor:
        """The layer's output, once keys (before rotation) and values are there."""
        x_BTD = x_BTD + self.self_attn.attend(q_BHTd, k_BGTd, v_BGTd, rotary)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DecoderLayer(PreNormLayer):
    """LLaMA, and LIMe over keys and values, where they are mixed with those of earlier layers, before rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        router = None
        if config.architecture == "lime" and layer > 0:
            router = KeyValueRouter(config.key_value_heads, make_policy(config.lime).reads(layer))
        super().__init__(config, layer, router)

    def forward(self, x_BTD: Tensor, history: KeyValueHistory | None) -> Tensor:
        attention = self.self_attn
        rotary = attention.rotary(x_BTD)
        if history is None:
            return self.alone(x_BTD, rotary)
        q_BHTd, k_BTC, v_BTC = self.before(x_BTD, rotary)
        batch, length, _ = x_BTD.shape
        k_NGd, v_NGd = (t.view(batch * length, -1, attention.head_size) for t in (k_BTC, v_BTC))
        mixed = history.mix(self.layer, k_NGd, v_NGd)
        k_BGTd, v_BGTd = (t.view(-1, batch, length, attention.head_size).transpose(0, 1) for t in mixed)
        return self.after(x_BTD, q_BHTd, k_BGTd, v_BGTd, rotary)

    def alone(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """The layer without a history."""
        q_BHTd, k_BTC, v_BTC = self.before(x_BTD, rotary)
        split = self.self_attn.split_heads
        return self.after(x_BTD, q_BHTd, split(k_BTC), split(v_BTC), rotary)

    def before(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d]; the layer's own keys and values [B, T, G·d]."""
        normed, attention = self.input_layernorm(x_BTD), self.self_attn
        return attention.queries(normed, rotary), attention.k_proj(normed), attention.v_proj(normed)


class HiddenDecoderLayer(PreNormLayer):
    """LIMe over hidden states: the layer's input goes into the history; from ``start_layer`` on, each head's key and value
    are projected from its own mixture of what the history holds."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        heads, read = config.num_attention_heads, len(make_policy(config.lime).reads(layer))
        router: Router | None = None
        if layer >= config.lime.start_layer:
            if config.lime.router == "dynamic":
                router = DynamicRouter(heads, read, config.hidden_size)
            else:
                router = StaticRouter(heads, read, config.lime.top_p)
        super().__init__(config, layer, router)
        if router is not None:
            self.history_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, history: HiddenHistory) -> Tensor:
        attention = self.self_attn
        rotary = attention.rotary(x_BTD)
        state_BTD, normed_BTD, q_BHTd = self.before(x_BTD, rotary)
        history.write(self.layer, state_BTD.flatten(0, 1), x_BTD.flatten(0, 1))
        if attention.router is None:
            k_BHTd, v_BHTd = (attention.split_heads(p(normed_BTD)) for p in (attention.k_proj, attention.v_proj))
        else:
            k_BHTd, v_BHTd = self.read(state_BTD, history)
        return self.after(x_BTD, q_BHTd, k_BHTd, v_BHTd, rotary)

    def before(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """The input divided by its root mean square, the normed input (both [B, T, D]), rotated queries [B, H, T, d]."""
        state_BTD = rms_normalise(x_BTD, self.input_layernorm.eps)
        normed_BTD = state_BTD * self.input_layernorm.weight
        return state_BTD, normed_BTD, self.self_attn.queries(normed_BTD, rotary)

    def read(self, state_BTD: Tensor, history: HiddenHistory) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, d] from the history under the layer's history norm."""
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

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[m_0 | m_1 … m_n] = αᵀ·streams; the sub-layer's output on LN(m_0), times β, is added to m_1 … m_n."""
        alpha: Tensor = self.static_alpha
        beta: Tensor = self.static_beta
        if self.dynamic:
            normed = layer_norm(streams_BTnD)
            dynamic = torch.tanh(normed @ torch.cat((self.dynamic_alpha, self.dynamic_beta.unsqueeze(-1)), -1))
            alpha = alpha + self.alpha_scale * dynamic[..., :-1]
            beta = beta + self.beta_scale * dynamic[..., -1]
        mixed = alpha.transpose(-1, -2) @ streams_BTnD
        out_BTD = sublayer(layer_norm(mixed[..., 0, :]))
        return mixed[..., 1:, :] + beta.unsqueeze(-1) * out_BTD.unsqueeze(-2)


class HyperDecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind a Hyper-Connection of its own; [B, T, n, D] -> [B, T, n, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rate, dynamic = config.hyper.rate, config.hyper.dynamic
        self.attn_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.self_attn = Attention(config, router=None)
        self.mlp_connection = HyperConnection(rate, config.hidden_size, dynamic)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, streams_BTnD: Tensor, history: None) -> Tensor:
        return self.alone(streams_BTnD, self.self_attn.rotary(streams_BTnD))

    def alone(self, streams_BTnD: Tensor, rotary: Rotary) -> Tensor:
        streams_BTnD = self.attn_connection(streams_BTnD, partial(self.self_attn, rotary=rotary))
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


def compile_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Compile decoder layers in place, with torch's inductor: a layer beside a history in its two parts, each one graph.

    All layers of a kind share what is compiled, once for every shape of their input.

    Raises:
        LimeError: there is nothing here to compile with.
    """
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    try:
        compiled(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LimeError(
            f"train.compile=true: torch cannot compile for {device} here ({reason}); install a C++ compiler (CPU) or "
            "Triton (GPU), or leave train.compile out"
        ) from None
    for layer in layers:
        for part in ("alone", "before", "after"):
            if hasattr(layer, part):
                setattr(layer, part, compiled(getattr(layer, part)))
