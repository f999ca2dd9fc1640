"""The parts of decoder layers, and what all layers share in one forward pass: positions, mask, key/value cache.

Shapes: B batch, T new tokens, S new and cached tokens, D hidden size, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lime import LimeConfig

# A module that is called without an input returns its weight. Weights are reached only so: with `device_map`, a weight that
# lies on another device or on disk exists in its module only while the module is called.


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

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight if x is None else rms_normalise(x, self.eps) * self.weight


class Projection(nn.Linear):
    """A matrix product without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight if x is None else super().forward(x)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), scaled."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        self.scale = config.residual_scale
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)) * self.scale


class Attention(nn.Module):
    """The projections of attention, and the router of the layer, if it has one."""

    router: Any

    def __init__(self, config: LimeConfig, router: nn.Module | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = Projection(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = Projection(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.scale = config.residual_scale
        self.q_norm = self.k_norm = None
        if config.numerics.get("qk_norm"):
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.router = router

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """[B, T, G·d] -> [B, G, T, d]."""
        return x_BTC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x_BTD: Tensor) -> Tensor:
        return self.split_heads(self.q_proj(x_BTD))

    def output(self, out_BHTd: Tensor) -> Tensor:
        """[B, T, D] from what the heads read."""
        return self.o_proj(out_BHTd.transpose(1, 2).flatten(2)) * self.scale

    def normed(self, q_BHTd: Tensor, k_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed by head if the model does that."""
        if self.q_norm is None or self.k_norm is None:
            return q_BHTd, k_BGTd
        return self.q_norm(q_BHTd), self.k_norm(k_BGTd)

    def keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.k_proj(x_BTD)), self.split_heads(self.v_proj(x_BTD))


def llama3_scaled(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """A frequency that makes n turns in the original sequence length is kept if n ≥ high_freq_factor, divided by the factor if
    n ≤ low_freq_factor, and interpolated between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


ROPE_TYPES = {
    "default": lambda frequencies, scaling: frequencies,
    "linear": lambda frequencies, scaling: frequencies / scaling["factor"],
    "llama3": llama3_scaled,
}


def rotary_frequencies(config: LimeConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """θ^(−2i/d) for the pairs i of a head, scaled as ``config.rope_parameters`` says."""
    even = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device)
    scaling = getattr(config, "rope_parameters", None) or {}
    rope_type = scaling.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type} is not supported, only {', '.join(ROPE_TYPES)}")
    return ROPE_TYPES[rope_type](config.rope_theta ** -(even / config.head_dim), scaling)


class Handed:
    """What layers hand on beside their output. It is no list: for layers on different devices, `accelerate` copies lists."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


class ForwardPass:
    """What the layers of one forward pass share.

    For every layer and token, the cache holds what attention reads: rotated keys and values after the mixture over layers. A
    mixture involves a single token, so past tokens need nothing else, and the cache is as large as LLaMA's.

    Args:
        hidden_BTD: the embedded tokens; only their shape, dtype and device are used.
        attention_mask: None; [B, S], 0 for padding; or a complete mask [B, 1, T, S].
        position_ids: [B, T]; None: counted from the first token that is not padding.
        cache: a `transformers` cache, or None.
        output_attentions: collect the weights of attention in ``attentions``, [B, H, T, S] by layer.
    """

    def __init__(
        self,
        config: LimeConfig,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        output_attentions: bool = False,
    ) -> None:
        self.attentions: list[Tensor] | None = [] if output_attentions else None
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
        frequencies = rotary_frequencies(config, accumulation_dtype, self.device)
        angle = position_ids.to(accumulation_dtype).unsqueeze(-1) * frequencies
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        self.cos, self.sin = angle.cos(), angle.sin()
        self._mask: tuple[int, Tensor | None, bool] | None = None

    def attend(self, layer: int, attention: Attention, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Attention, from queries and keys before norm and rotation; returns [B, T, D]."""
        return self.attend_normed(layer, attention, *attention.normed(q_BHTd, k_BGTd), v_BGTd)

    def attend_normed(self, layer: int, attention: Attention, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Attention, from queries and keys before rotation; returns [B, T, D]."""
        q_BHTd, k_BGTd, v_BGTd, mask, is_causal = self.with_past(layer, q_BHTd, k_BGTd, v_BGTd)
        if self.attentions is not None:
            out_BHTd = self._attend_and_keep_weights(self.attentions, q_BHTd, k_BGTd, v_BGTd, mask, is_causal)
        else:
            out_BHTd = F.scaled_dot_product_attention(
                q_BHTd, k_BGTd, v_BGTd, mask, is_causal=is_causal, enable_gqa=q_BHTd.shape[1] != k_BGTd.shape[1]
            )
        return attention.output(out_BHTd)

    def with_past(
        self, layer: int, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
        """Rotated queries, rotated keys and values of all tokens so far, the mask over them or None, and whether attention is to
        apply a causal mask itself."""
        q_BHTd, k_BGTd = self._rotate(q_BHTd), self._rotate(k_BGTd)
        if self.cache is not None:
            k_BGTd, v_BGTd = self.cache.update(k_BGTd, v_BGTd, layer)
        mask, is_causal = self._mask_for(k_BGTd.shape[2])
        return q_BHTd, k_BGTd, v_BGTd, None if mask is None else mask.to(q_BHTd.device), is_causal

    def _attend_and_keep_weights(
        self, kept: list[Tensor], q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Attention by its definition; `scaled_dot_product_attention` does not return the weights."""
        k_BHSd, v_BHSd = (x.repeat_interleave(q_BHTd.shape[1] // x.shape[1], 1) for x in (k_BGTd, v_BGTd))
        scores_BHTS = q_BHTd @ k_BHSd.transpose(-1, -2) * q_BHTd.shape[-1] ** -0.5
        if is_causal:
            mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=scores_BHTS.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores_BHTS = scores_BHTS + mask
        accumulation_dtype = torch.promote_types(scores_BHTS.dtype, torch.float32)
        weights_BHTS = scores_BHTS.softmax(-1, dtype=accumulation_dtype).to(q_BHTd.dtype)
        kept.append(weights_BHTS)
        return weights_BHTS @ v_BHSd

    def _rotate(self, x_BHTd: Tensor) -> Tensor:
        half = x_BHTd.shape[-1] // 2
        cos, sin = self.cos.to(x_BHTd.device), self.sin.to(x_BHTd.device)
        x = x_BHTd.to(cos.dtype)
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos + rotated * sin).to(x_BHTd.dtype)

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


class CheckpointedLayer(nn.Module):
    """A layer of which a part can be computed again in the backward pass (``model.gradient_checkpointing_enable()``)."""

    gradient_checkpointing = False  # `transformers` sets both
    _gradient_checkpointing_func: Any

    def checkpointed(self, part: Any, run: ForwardPass, *tensors: Tensor) -> Tensor:
        """``part(run, *tensors)``, whose activations are not kept if gradient checkpointing is on.

        The part must not write to the layer history, because it is computed twice.
        """
        if self.gradient_checkpointing and self.training and run.cache is None and run.attentions is None:
            return self._gradient_checkpointing_func(part, run, *tensors)
        return part(run, *tensors)


class PreNormLayer(CheckpointedLayer):
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
        return self.checkpointed(self._finish, run, x_BTD, q_BHTd, k_BGTd, v_BGTd)

    def _finish(self, run: ForwardPass, x_BTD: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        x_BTD = x_BTD + run.attend(self.layer, self.self_attn, q_BHTd, k_BGTd, v_BGTd)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
