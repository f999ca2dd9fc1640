"""Gated residual (Qwen, arXiv 2608.30320): n residual streams, [B, T, n, D], with gates per channel and per stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import MLP, Attention, CheckpointedLayer, ForwardPass, rms_normalise
from .modeling_lime import BaseForCausalLM, BaseModel


class StreamNorm(nn.Module):
    """RMSNorm of each stream with its own weights."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.gated_residual["rate"], config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, streams_BTnD: Tensor) -> Tensor:
        return rms_normalise(streams_BTnD, self.eps) * self.weight


class GatedRead(nn.Module):
    """The mean of the normed streams, each channel through a gate: x, and the normed streams as one vector per token."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        self.rate, hidden = config.gated_residual["rate"], config.hidden_size
        bottleneck = max(1, hidden // 8)
        self.norm = StreamNorm(config)
        self.compress_proj = nn.Linear(self.rate * hidden, bottleneck, bias=False)
        self.expand_proj = nn.Linear(bottleneck, self.rate * hidden, bias=False)

    def read(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(streams_BTnD)
        vector = normed.flatten(-2)
        gates = self.expand_proj(F.silu(self.compress_proj(vector) / self.rate)).sigmoid()
        return (gates.view_as(normed) * normed).mean(-2), vector


class FinalRead(GatedRead):
    """The read before the output projection."""

    def forward(self, streams_BTnD: Tensor) -> Tensor:
        return self.read(streams_BTnD)[0]


class GatedConnection(GatedRead):
    """How a sub-layer reads from and writes to the streams."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.write_proj = nn.Linear(self.rate * config.hidden_size, self.rate, bias=False)

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        x_BTD, vector = self.read(streams_BTnD)
        gates = 2 * (self.write_proj(vector) / self.rate).sigmoid()
        return streams_BTnD + gates.unsqueeze(-1) * sublayer(x_BTD).unsqueeze(-2)


class GatedResidualLayer(CheckpointedLayer):
    """Attention and SwiGLU, each with its own connection."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn_connection = GatedConnection(config)
        self.self_attn = Attention(config)
        self.mlp_connection = GatedConnection(config)
        self.mlp = MLP(config)

    def forward(self, streams_BTnD: Tensor, history: None, run: ForwardPass) -> Tensor:
        return self.checkpointed(self._forward, run, streams_BTnD)

    def _forward(self, run: ForwardPass, streams_BTnD: Tensor) -> Tensor:
        def attend(x_BTD: Tensor) -> Tensor:
            attention = self.self_attn
            return run.attend(self.layer, attention, attention.queries(x_BTD), *attention.keys_and_values(x_BTD))

        def feed_forward(x_BTD: Tensor) -> Tensor:  # `device_map` would move a module among the arguments
            return self.mlp(x_BTD)

        return self.mlp_connection(self.attn_connection(streams_BTnD, attend), feed_forward)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        return [GatedResidualLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def make_norm(self, config: LimeConfig) -> nn.Module:
        return FinalRead(config)

    def open_history(self) -> None:
        return None

    def first_input(self, x_BTD: Tensor) -> Tensor:
        """Every stream starts as the embedded tokens."""
        return x_BTD.unsqueeze(-2).expand(-1, -1, self.config.gated_residual["rate"], -1)

    def shown_state(self, x: Tensor) -> Tensor:
        """The sum of the streams."""
        return x.sum(-2)


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
