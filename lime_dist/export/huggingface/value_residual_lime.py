"""Value residual (ResFormer, arXiv 2410.17897): layers add the first layer's values to their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import ForwardPass, Handed, PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel


class ValueRouter(nn.Module):
    """The learnable factors of the first layer's values and of the layer's own, [2]."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([first, 1 - first]))

    def forward(self) -> Tensor:
        return self.weight


class ValueResidualLayer(PreNormLayer):
    """From layer 1 on, attention reads a weighted sum of the first layer's values and the layer's own."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        self.first = float(config.value_residual["weight"])
        super().__init__(
            config, layer, ValueRouter(self.first) if config.value_residual["learnable"] and layer else None
        )

    def forward(self, x_BTD: Tensor, first_values: Handed, run: ForwardPass) -> Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x_BTD)
        key, value = attention.keys_and_values(normed)
        if self.layer == 0:
            first_values.tensors.append(value)
        else:
            first = first_values.tensors[0].to(value.device)
            if attention.router is None:
                value = self.first * first + (1 - self.first) * value
            else:
                first_factor, own_factor = attention.router()
                value = first_factor * first + own_factor * value
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        return [ValueResidualLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self) -> Handed:
        """The values of the new tokens in the first layer; the cache holds what attention read for past tokens."""
        return Handed()


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
