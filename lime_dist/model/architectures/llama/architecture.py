"""The object that describes LLaMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lime_dist.config.schema import ModelConfig, NumericsConfig
from lime_dist.model.architecture import Architecture, ExportFormat, Flops, Group, Sizes
from lime_dist.model.crossing import Prices
from lime_dist.model.transformer import (
    Activations,
    initialise_shared,
    norm_activations,
    norm_parameters,
    projection_parameters,
    shared_parameter_group,
    transformer_activations,
    transformer_flops,
)
from lime_dist.model.without_history import WithoutHistory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Llama(WithoutHistory, Architecture):
    """With the same weights, and without ``model.numerics``, it gives the logits of the ``LlamaForCausalLM`` of `transformers`."""

    title = "LLaMA"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def check(self) -> None:
        """Every configuration is a LLaMA's."""

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return (self.config.hidden_size,)

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.llama.layer import LlamaLayer

        return LlamaLayer(self.config, layer)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def last_output(self, hidden: Tensor) -> Tensor:
        return hidden

    def layer_parameters(self, layer: int) -> Sizes:
        return projection_parameters(self.config) | norm_parameters(self.config)

    def parameter_group(self, name: str) -> Group:
        return shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        initialise_shared(self.config, name, value, generator)

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        return [transformer_flops(self.config, sequence_length)] * len(layers)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        kept = Activations(per_token=self.config.hidden_size)  # the layer's input
        if not checkpointing:
            kept = transformer_activations(self.config) + norm_activations(self.config)
        return kept.nbytes(num_tokens, itemsize)

    @property
    def export_format(self) -> ExportFormat:
        """The LLaMA of `transformers` knows none of ``model.numerics``."""
        if self.config.numerics != NumericsConfig():
            return ExportFormat("LimeForCausalLM", {"architecture": "llama"}, "LimeModel", "llama_lime.py")
        values = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": self.config.head_size}
        return ExportFormat("LlamaForCausalLM", {"model_type": "llama", **values})

    def check_llama_start(self) -> None:
        """A LLaMA starts as the LLaMA it was."""
