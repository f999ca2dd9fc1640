"""LLaMA with what ``model.numerics`` adds: norms of queries and keys, bounded logits, scales."""

from __future__ import annotations

from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import ForwardPass, PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel


class LlamaLayer(PreNormLayer):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__(config, layer, None)

    def forward(self, x_BTD: Tensor, history: None, run: ForwardPass) -> Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x_BTD)
        key, value = attention.keys_and_values(normed)
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        return [LlamaLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self) -> None:
        return None


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
