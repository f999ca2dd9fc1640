"""The models once more, written from the equations with plain loops and no code of lime_dist's: slow and obviously right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lime_dist.config.schema import ModelConfig

Weights = Mapping[str, Tensor]


def logits(config: ModelConfig, weights: Weights, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of the decoder with these weights, by exported name."""
    x = weights["model.embed_tokens.weight"][tokens_BT]
    slots: list[tuple[Tensor, Tensor]] = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(config, weights, prefix, layer, normed, slots)
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ weights[prefix + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def attention(
    config: ModelConfig, weights: Weights, prefix: str, layer: int, x: Tensor, slots: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """One attention sub-layer; appends this layer's (k, v), [B, T, G, d] each, to ``slots``."""
    batch, length, _ = x.shape
    heads, groups, size = config.num_attention_heads, config.key_value_heads, config.head_size
    q = (x @ weights[prefix + "self_attn.q_proj.weight"].T).view(batch, length, heads, size)
    k = (x @ weights[prefix + "self_attn.k_proj.weight"].T).view(batch, length, groups, size)
    v = (x @ weights[prefix + "self_attn.v_proj.weight"].T).view(batch, length, groups, size)
    slots.append((k, v))
    if config.architecture == "lime" and layer > 0:
        router = weights[prefix + "self_attn.router.weight"]
        k, v = (mix(router, [slot[part] for slot in slots]) for part in (0, 1))
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        rows = []
        for position in range(length):
            scores = torch.einsum("bd,btd->bt", q[:, position, head], k[:, : position + 1, group]) / size**0.5
            rows.append(torch.einsum("bt,btd->bd", scores.softmax(-1), v[:, : position + 1, group]))
        outputs.append(torch.stack(rows, 1))
    return torch.cat(outputs, -1) @ weights[prefix + "self_attn.o_proj.weight"].T


def mix(router: Tensor, slots: list[Tensor]) -> Tensor:
    """Σ_ℓ' Σ_g' R[g, ℓ'G+g']·S_ℓ',g' for every g; slots are [B, T, G, d]."""
    groups = router.shape[0]
    mixed = []
    for g in range(groups):
        total = torch.zeros_like(slots[0][:, :, 0])
        for index, slot in enumerate(slots):
            for other in range(groups):
                total = total + router[g, index * groups + other] * slot[:, :, other]
        mixed.append(total)
    return torch.stack(mixed, 2)


def rotate(x_BTHd: Tensor, theta: float) -> Tensor:
    """Rotary embedding: pairs (i, i + d/2) turned by position · θ^(−2i/d)."""
    length, size = x_BTHd.shape[1], x_BTHd.shape[-1]
    out = torch.empty_like(x_BTHd)
    for i in range(size // 2):
        angle = torch.arange(length, dtype=x_BTHd.dtype) * theta ** (-2 * i / size)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        first, second = x_BTHd[..., i], x_BTHd[..., i + size // 2]
        out[..., i] = first * cos - second * sin
        out[..., i + size // 2] = second * cos + first * sin
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
