"""The parts of decoder layers, and what all layers share in one forward pass: positions, mask, key/value cache.

Shapes: B batch, T new tokens, S new and cached tokens, D hidden size, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lime import LimeConfig


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, computed in at least float32."""
    accumulation_dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(accumulation_dtype), x.shape[-1:], None, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps) * self.weight


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """The projections of attention, and the router of the layer, if it has one."""

    router: Any

    def __init__(self, config: LimeConfig, router: nn.Module | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.router = router

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """[B, T, G·d] -> [B, G, T, d]."""
        return x_BTC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x_BTD: Tensor) -> Tensor:
        return self.split_heads(self.q_proj(x_BTD))

    def keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.k_proj(x_BTD)), self.split_heads(self.v_proj(x_BTD))


class ForwardPass:
    """What the layers of one forward pass share.

    For every layer and token, the cache holds what attention reads: rotated keys and values after the mixture over layers. A
    mixture involves a single token, so past tokens need nothing else, and the cache is as large as LLaMA's.

    Args:
        hidden_BTD: the embedded tokens; only their shape, dtype and device are used.
        attention_mask: None; [B, S], 0 for padding; or a complete mask [B, 1, T, S].
        position_ids: [B, T]; None: counted from the first token that is not padding.
        cache: a `transformers` cache, or None.
    """

    def __init__(
        self,
        config: LimeConfig,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> None:
        self.length, self.device, self.cache = hidden_BTD.shape[1], hidden_BTD.device, cache
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        self.complete_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        self.padding: Tensor | None = None
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all()):
            self.padding = attention_mask.bool()
        if position_ids is None and self.padding is not None:
            position_ids = (self.padding.long().cumsum(-1) - 1).clamp(min=0)[:, -self.length :]
        elif position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.length, device=self.device).unsqueeze(0)
        accumulation_dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        even = torch.arange(0, config.head_dim, 2, dtype=accumulation_dtype, device=self.device)
        angle = position_ids.to(accumulation_dtype).unsqueeze(-1) * config.rope_theta ** -(even / config.head_dim)
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        self.cos, self.sin = angle.cos(), angle.sin()
        self._mask: tuple[int, Tensor | None, bool] | None = None

    def attend(self, layer: int, attention: Attention, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Attention, from queries and keys before rotation; returns [B, T, D]."""
        q_BHTd, k_BGTd = self._rotate(q_BHTd), self._rotate(k_BGTd)
        if self.cache is not None:
            k_BGTd, v_BGTd = self.cache.update(k_BGTd, v_BGTd, layer)
        mask, is_causal = self._mask_for(k_BGTd.shape[2])
        out_BHTd = F.scaled_dot_product_attention(
            q_BHTd, k_BGTd, v_BGTd, mask, is_causal=is_causal, enable_gqa=q_BHTd.shape[1] != k_BGTd.shape[1]
        )
        return attention.o_proj(out_BHTd.transpose(1, 2).flatten(2))

    def _rotate(self, x_BHTd: Tensor) -> Tensor:
        half = x_BHTd.shape[-1] // 2
        x = x_BHTd.to(self.cos.dtype)
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * self.cos + rotated * self.sin).to(x_BHTd.dtype)

    def _mask_for(self, keys: int) -> tuple[Tensor | None, bool]:
        """The mask over ``keys`` keys, or None; and whether attention applies a causal mask itself. Same for all layers."""
        if self._mask is None or self._mask[0] != keys:
            self._mask = (keys, *self._make_mask(keys))
        return self._mask[1:]

    def _make_mask(self, keys: int) -> tuple[Tensor | None, bool]:
        if self.complete_mask is not None:
            return self.complete_mask[..., :keys], False
        if self.padding is None and keys == self.past + self.length and (self.past == 0 or self.length == 1):
            return None, self.length > 1
        key = torch.arange(keys, device=self.device)
        query = self.past + torch.arange(self.length, device=self.device).unsqueeze(-1)
        allowed = (key <= query).unsqueeze(0)
        if self.padding is not None:
            present = F.pad(self.padding, (0, keys - self.padding.shape[1]), value=False)
            # Padding attends to itself, because a softmax over no keys is NaN.
            allowed = (allowed & present.unsqueeze(1)) | (key == query)
        return allowed.unsqueeze(1), False


class PreNormLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: LimeConfig, layer: int, router: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, router)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def finish(self, x_BTD: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, run: ForwardPass) -> Tensor:
        """The layer's output from its input, queries and keys before rotation, and values."""
        x_BTD = x_BTD + run.attend(self.layer, self.self_attn, q_BHTd, k_BGTd, v_BGTd)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
