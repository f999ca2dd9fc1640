"""The object that describes Hyper-Connections."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from lime_dist.config.registry import CONNECTIONS
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Architecture, ExportFormat, Flops, Group, Sizes
from lime_dist.model.architectures.hyper.connection import Connection
from lime_dist.model.crossing import Prices
from lime_dist.model.transformer import (
    Activations,
    initialise_shared,
    projection_parameters,
    shared_parameter_group,
    transformer_activations,
    transformer_flops,
)
from lime_dist.model.without_history import WithoutHistory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONNECTION = "_connection."
"""What stands between a sub-layer and a parameter of its connection in exported names."""


class Hyper(WithoutHistory, Architecture):
    """n = ``model.hyper.rate`` streams; both sub-layers of a layer have a connection of the kind ``model.hyper.connection``."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @cached_property
    def connection(self) -> Connection:
        kind: type[Connection] = CONNECTIONS[self.config.hyper.connection]
        return kind(self.config)

    @property
    def title(self) -> str:
        return self.connection.title

    def check(self) -> None:
        self.connection.check()

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return self.config.hyper.rate, self.config.hidden_size

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.hyper.layer import HyperDecoderLayer

        return HyperDecoderLayer(self.config, self.connection)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        """Every stream starts as the embedding."""
        return embedded_BTD.unsqueeze(-2).expand(-1, -1, self.config.hyper.rate, -1)

    def last_output(self, hidden: Tensor) -> Tensor:
        """The streams are summed."""
        return hidden.sum(-2)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        connections = {
            f"{sublayer}{CONNECTION}{name}": size
            for sublayer in ("attn", "mlp")
            for name, size in self.connection.parameters().items()
        }
        return projection_parameters(self.config) | self.connection.norm_parameters() | connections

    def parameter_group(self, name: str) -> Group:
        _, is_connection, own = name.partition(CONNECTION)
        return self.connection.parameter_group(own) if is_connection else shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        _, is_connection, own = name.partition(CONNECTION)
        if is_connection:
            self.connection.initialise(own, int(name.split(".")[2]), value, generator)
        else:
            initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        connection = self.connection.flops()
        return [transformer_flops(self.config, sequence_length) + connection + connection] * len(layers)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        rate = self.config.hyper.rate
        streams = rate if layer > 0 else 1  # they start as views of one embedding
        kept = Activations(per_token=streams * self.config.hidden_size)  # the layer's input
        if not checkpointing:
            kept = self.connection.activations(streams) + self.connection.activations(rate)
            kept += transformer_activations(self.config)
        return kept.nbytes(num_tokens, itemsize)

    def feed_forward_activations(self) -> Activations:
        """The MLP's connection is computed again from the streams."""
        width = self.config.hyper.rate * self.config.hidden_size
        kept = Activations(per_token=4 * self.config.intermediate_size - width)
        return kept + self.connection.activations(self.config.hyper.rate)

    def feed_forward_flops(self, defers_weights: bool) -> float:
        return self.connection.flops().forward + super().feed_forward_flops(defers_weights=True)

    def received_activation_bytes(self, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        received = Activations() if checkpointing else self.connection.received_activations()
        return received.nbytes(num_tokens, itemsize)

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        values = {"architecture": "hyper", "hyper": self.config.hyper.model_dump(mode="json")}
        return ExportFormat("LimeForCausalLM", values, "LimeModel", self.connection.code)

    def check_llama_start(self) -> None:
        raise ValueError("model.architecture=hyper cannot start from a LLaMA; use llama or lime")
