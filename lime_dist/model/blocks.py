"""The parts of decoder layers that architectures share: attention, the pre-norm layer, compilation.

A decoder layer takes and returns the hidden state, [B, T, D] ([B, T, n, D] with n residual streams), and may use the layer
history. Its `compiled_parts` name the methods that `compile_layers` compiles; none of them uses the history.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError, first_line
from lime_dist.model.layers import (
    MLP,
    Positions,
    RMSNorm,
    causal_attention,
    rotary_table,
    rotate,
    scaled,
    within_documents,
)
from lime_dist.model.recomputation import feed_forward_half
from lime_dist.model.scaling import residual_scale
from lime_dist.model.weight_gradients import Projection


class Router(Protocol):
    """A module with the weights by which a layer mixes entries of the history."""

    def matrix(self) -> Tensor | None:
        """The weights; None if they depend on the layer's input."""


class Attention(nn.Module):
    """Grouped-query causal attention with rotary embedding, and the router of the layer, if it has one.

    With ``model.numerics.qk_norm``, every head's queries and keys (after a mixture over layers) are normed before their rotation.
    """

    router: nn.Module | None
    needs_tensor_mask: ClassVar[bool] = False
    """Whether the mask of documents is to be a tensor on every device."""

    def __init__(self, config: ModelConfig, router: nn.Module | None) -> None:
        super().__init__()
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_size
        self.head_size, self.rope_theta, self.rope_scaling = size, config.rope_theta, config.rope_scaling
        self.q_proj = Projection(hidden, heads * size)
        self.k_proj = Projection(hidden, config.key_value_heads * size)
        self.v_proj = Projection(hidden, config.key_value_heads * size)
        self.o_proj = Projection(heads * size, hidden)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.numerics.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.numerics.qk_norm else None
        self.scale = residual_scale(config)
        self.router = router

    def positions(self, x_BTD: Tensor, starts_BT: Tensor | None) -> Positions:
        """The positions of a micro-batch with this hidden state, with or without residual streams.

        Args:
            starts_BT: where documents begin (`documents.document_starts`); None: attention and positions cross them.
        """
        length, dtype, device = x_BTD.shape[1], x_BTD.dtype, x_BTD.device
        table = rotary_table(length, self.head_size, self.rope_theta, self.rope_scaling, dtype, device)
        return (
            Positions(*table)
            if starts_BT is None
            else within_documents(*table, starts_BT, dtype, self.needs_tensor_mask)
        )

    def split_heads(self, x_BTC: Tensor) -> Tensor:
        """[B, T, G·d] -> [B, G, T, d]."""
        return x_BTC.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def queries(self, x_BTD: Tensor, positions: Positions) -> Tensor:
        """Rotated queries, [B, H, T, d]."""
        q_BHTd = self.split_heads(self.q_proj(x_BTD))
        return rotate(q_BHTd if self.q_norm is None else self.q_norm(q_BHTd), positions)

    def keys(self, k_BGTd: Tensor, positions: Positions) -> Tensor:
        """Rotated keys, from keys before norm and rotation."""
        return rotate(k_BGTd if self.k_norm is None else self.k_norm(k_BGTd), positions)

    def attend(self, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, positions: Positions) -> Tensor:
        """Attention, from rotated queries, keys before norm and rotation, and values; returns [B, T, D]."""
        out_BTC = causal_attention(q_BHTd, self.keys(k_BGTd, positions), v_BGTd, positions.mask)
        return self.output(out_BTC)

    def output(self, out_BTC: Tensor) -> Tensor:
        """[B, T, D] from what the heads read, [B, T, H·d]."""
        return scaled(self.o_proj(out_BTC), self.scale)

    def forward(self, x_BTD: Tensor, positions: Positions) -> Tensor:
        """Attention without a history."""
        key, value = self.split_heads(self.k_proj(x_BTD)), self.split_heads(self.v_proj(x_BTD))
        return self.attend(self.queries(x_BTD, positions), key, value, positions)


class PreNormLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream. Subclasses define the keys and values."""

    compiled_parts: ClassVar[tuple[str, ...]]

    def __init__(self, config: ModelConfig, layer: int, router: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, router)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def routing(self) -> Tensor | None:
        """The weights by which the layer mixes entries; None if they depend on its input, or it has no router."""
        router = self.self_attn.router
        return None if router is None else cast(Router, router).matrix()

    def project(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d]; the layer's own keys and values, [B, T, G·d] each."""
        normed, attention = self.input_layernorm(x_BTD), self.self_attn
        return attention.queries(normed, positions), attention.k_proj(normed), attention.v_proj(normed)

    def finish(self, x_BTD: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, positions: Positions) -> Tensor:
        """The layer's output from its input, rotated queries, keys before rotation, and values."""
        x_BTD = x_BTD + self.self_attn.attend(q_BHTd, k_BGTd, v_BGTd, positions)
        return x_BTD + feed_forward_half(self.feed_forward, x_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The MLP behind its norm."""
        return cast(Tensor, self.mlp(self.post_attention_layernorm(x_BTD)))


def compile_layers(
    layers: Iterable[nn.Module], device: torch.device, setting: bool | Literal["auto"], splits_backward: bool = False
) -> str | None:
    """Compile the `compiled_parts` of decoder layers in place, each as one graph, with torch's inductor.

    Layers of the same class share the compiled code. Every input shape is compiled once.

    Args:
        setting: ``train.compile``; ``auto`` compiles for CUDA, where torch can.
        splits_backward: whether weight gradients are computed apart, which a compiled graph does not allow.

    Returns:
        In one line, why nothing was compiled, although ``auto`` would have compiled; else None.

    Raises:
        LimeError: torch cannot compile on this machine, and ``setting`` is true.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return None
    if splits_backward:
        return (
            "layers run uncompiled, which is slower: the backward pass of a compiled graph computes all of its gradients at once, "
            "but pipeline.schedule asks for weight gradients apart; set train.compile=false, or choose another schedule"
        )
    if (reason := compile_obstacle(device)) is not None:
        problem = f"torch cannot compile for {device} here ({reason})"
        if setting == "auto":
            return f"layers run uncompiled, which is slower: {problem}; install Triton, or set train.compile=false"
        raise LimeError(
            f"train.compile=true: {problem}; install a C++ compiler (CPU) or Triton (GPU), or leave out train.compile"
        )
    for layer in layers:
        for part in cast("tuple[str, ...]", layer.compiled_parts):
            setattr(layer, part, _compiled(getattr(layer, part)))
    return None


def compile_obstacle(device: torch.device) -> str | None:
    """The first line of the error with which torch fails to compile for a device; None if it can."""
    try:
        _compiled(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        return first_line(error)
    return None


_compiled = partial(torch.compile, fullgraph=True, dynamic=False)
