"""The parts of decoder layers: RMSNorm, rotary embedding, attention, SwiGLU; token embedding and loss.

Shapes: B batch, T tokens, N = B·T, D hidden size, H query heads, G K/V heads, d head size, F intermediate size.
Tensor names end in the tensor's shape where this helps: x_BTD, q_BHTd.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.config.schema import ModelConfig, RopeScalingConfig
from lime_dist.model.documents import attention_with_mask, document_mask, tensor_mask
from lime_dist.model.norm_rotation import Rotate, rms_norm
from lime_dist.model.scaling import residual_scale
from lime_dist.model.weight_gradients import Projection

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@lru_cache(maxsize=16)
def rotary_table(
    length: int,
    head_size: int,
    theta: float,
    scaling: RopeScalingConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency, [T, d] each, in at least float32. Both halves of d are equal, as in LLaMA."""
    accumulation_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = theta ** -(torch.arange(0, head_size, 2, dtype=accumulation_dtype, device=device) / head_size)
    angle = torch.outer(
        torch.arange(length, dtype=accumulation_dtype, device=device), scaled_frequencies(frequency, scaling)
    )
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def scaled_frequencies(frequency: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """The frequencies θ^(−2i/d), radians per token, as ``model.rope_scaling`` changes them.

    With ``llama3``, a frequency that makes n turns in the original sequence length L is kept if n ≥ high, divided by the factor
    if n ≤ low, and interpolated between: share s = (n − low) / (high − low) of it is kept.
    """
    if scaling.factor is None:
        return frequency
    if scaling.original_max_position_embeddings is None:
        return frequency / scaling.factor
    low, high = cast(float, scaling.low_freq_factor), cast(float, scaling.high_freq_factor)
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


class Positions(NamedTuple):
    """Where the tokens of a micro-batch stand, as attention needs to know it.

    Attributes:
        cos, sin: of position · frequency, in at least float32; [T, d], or [B, 1, T, d] where positions restart within samples.
        mask: which keys a query reads, of `documents.document_mask`; None: all up to its own.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None = None


def within_documents(
    cos_Td: Tensor, sin_Td: Tensor, starts_BT: Tensor, dtype: torch.dtype, as_tensor: bool = False
) -> Positions:
    """Positions that restart where documents begin, and the mask of attention within documents.

    Args:
        cos_Td, sin_Td: of `rotary_table`.
        starts_BT: of `documents.document_starts`.
        dtype: of queries and keys.
        as_tensor: make the mask a tensor on every device.
    """
    positions_BT = torch.arange(starts_BT.shape[1], device=starts_BT.device) - starts_BT
    cos, sin = (table[positions_BT].unsqueeze(1) for table in (cos_Td, sin_Td))
    mask = tensor_mask(starts_BT, dtype) if as_tensor else document_mask(starts_BT, dtype, cos_Td.shape[-1])
    return Positions(cos, sin, mask)


def rotate(x_BHTd: Tensor, positions: Positions) -> Tensor:
    """Apply rotary position embedding (arXiv 2104.09864) to [B, H, T, d]."""
    return Rotate.apply(x_BHTd, positions.cos, positions.sin)


def causal_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Causal softmax attention; K/V head g serves the H/G query heads from g·H/G on; returns [B, T, H·d].

    On a GPU, the kernels for float32 and float64 need as many K/V heads as query heads.

    Args:
        mask: of `Positions`.
    """
    if mask is not None:
        return attention_with_mask(q_BHTd, k_BGTd, v_BGTd, mask).transpose(1, 2).flatten(2)
    group = q_BHTd.shape[1] // k_BGTd.shape[1]
    if group > 1 and q_BHTd.device.type != "cpu" and q_BHTd.dtype in (torch.float32, torch.float64):
        k_BGTd, v_BGTd, group = k_BGTd.repeat_interleave(group, 1), v_BGTd.repeat_interleave(group, 1), 1
    out_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, is_causal=True, enable_gqa=group > 1)
    return out_BHTd.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), times `scaling.residual_scale`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.scale = residual_scale(config)
        self.gate_proj = Projection(hidden_size, intermediate_size)
        self.up_proj = Projection(hidden_size, intermediate_size)
        self.down_proj = Projection(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), self.scale)


def scaled(x: Tensor, scale: float) -> Tensor:
    """``scale`` · x; x itself for 1."""
    return x if scale == 1 else x * scale


class Embedding(nn.Module):
    """Token embedding; its weight may also serve as the output projection (``tie_word_embeddings``)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] with the embedding's weight as the output projection."""
        return F.linear(x_BTD, self.weight)


def language_model_loss(
    logits_BTV: Tensor, labels_BT: Tensor, counted_share: float | None = None, z_loss: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats per token, and the z-loss, computed in at least float32.

    Args:
        counted_share: expected share of the labels that count; the others are -100. The sum is divided by this share of B·T,
            not by the number of labels that count in this batch, so that the mean over micro-batches weights all tokens
            equally. None: all labels count.
        z_loss: ``train.z_loss``.
    """
    logits = logits_BTV.flatten(0, 1)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    labels = labels_BT.flatten()
    if z_loss:
        counted = labels != IGNORED_LABEL
        count = counted.sum() if counted_share is None else labels.numel() * counted_share
        squares = (logits.logsumexp(-1).square() * counted).sum()
        return (F.cross_entropy(logits, labels, reduction="sum") + z_loss * squares) / count
    if counted_share is not None:
        return F.cross_entropy(logits, labels, reduction="sum") / (labels.numel() * counted_share)
    return F.cross_entropy(logits, labels)
