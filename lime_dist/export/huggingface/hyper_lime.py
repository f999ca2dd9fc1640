"""A decoder layer with Hyper-Connections (arXiv 2409.19606): n residual streams, [B, T, n, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import MLP, Attention, CheckpointedLayer, ForwardPass
from .modeling_lime import BaseForCausalLM, BaseModel

LAYER_NORM_EPS = 1e-5


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


class HyperConnection(nn.Module):
    """How a sub-layer reads from and writes to the streams. The initial values are those of a pre-norm decoder."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__()
        rate, self.dynamic = config.hyper["rate"], config.hyper["dynamic"]
        self.static_alpha = nn.Parameter(torch.cat((torch.eye(rate)[:, layer % rate, None], torch.eye(rate)), 1))
        self.static_beta = nn.Parameter(torch.ones(rate))
        if self.dynamic:
            self.dynamic_alpha = nn.Parameter(torch.zeros(config.hidden_size, rate + 1))
            self.dynamic_beta = nn.Parameter(torch.zeros(config.hidden_size))
            self.alpha_scale = nn.Parameter(torch.tensor(0.01))
            self.beta_scale = nn.Parameter(torch.tensor(0.01))

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[m_0 | m_1 … m_n] = αᵀ·streams; returns m_i + β_i · sublayer(m_0) for i = 1 … n."""
        alpha: Tensor = self.static_alpha
        beta: Tensor = self.static_beta
        if self.dynamic:
            weights = torch.cat((self.dynamic_alpha, self.dynamic_beta.unsqueeze(-1)), -1)
            dynamic = torch.tanh(layer_norm(streams_BTnD) @ weights)
            alpha = alpha + self.alpha_scale * dynamic[..., :-1]
            beta = beta + self.beta_scale * dynamic[..., -1]
        mixed = alpha.transpose(-1, -2) @ streams_BTnD
        out_BTD = sublayer(mixed[..., 0, :])
        return mixed[..., 1:, :] + beta.unsqueeze(-1) * out_BTD.unsqueeze(-2)


class HyperLayer(CheckpointedLayer):
    """Attention and SwiGLU, each with its own hyper-connection. Subclasses may have other connections."""

    connection: type[nn.Module] = HyperConnection

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn_connection = self.connection(config, layer)
        self.self_attn = Attention(config)
        self.mlp_connection = self.connection(config, layer)
        self.mlp = MLP(config)

    def forward(self, streams_BTnD: Tensor, history: None, run: ForwardPass) -> Tensor:
        return self.checkpointed(self._forward, run, streams_BTnD)

    def _forward(self, run: ForwardPass, streams_BTnD: Tensor) -> Tensor:
        def attend(x_BTD: Tensor) -> Tensor:
            x_BTD, attention = self.attention_norm(x_BTD), self.self_attn
            return run.attend(self.layer, attention, attention.queries(x_BTD), *attention.keys_and_values(x_BTD))

        def feed_forward(x_BTD: Tensor) -> Tensor:  # `device_map` would move a module among the arguments
            return self.mlp(self.mlp_norm(x_BTD))

        return self.mlp_connection(self.attn_connection(streams_BTnD, attend), feed_forward)

    def attention_norm(self, x_BTD: Tensor) -> Tensor:
        return layer_norm(x_BTD)

    def mlp_norm(self, x_BTD: Tensor) -> Tensor:
        return layer_norm(x_BTD)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    layer_class: type[HyperLayer] = HyperLayer

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        return [self.layer_class(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self) -> None:
        return None

    def first_input(self, x_BTD: Tensor) -> Tensor:
        """Every stream starts as the embedded tokens."""
        return x_BTD.unsqueeze(-2).expand(-1, -1, self.config.hyper["rate"], -1)

    def last_output(self, x: Tensor) -> Tensor:
        """The sum of the streams."""
        return x.sum(-2)


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
