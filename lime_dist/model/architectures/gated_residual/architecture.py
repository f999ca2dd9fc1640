"""The object that describes gated residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Architecture, ExportFormat, Flops, Group, Sizes
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

BOTTLENECK = 8
"""The gates of a read come from D / 8 elements, as in the paper."""


class GatedResidual(WithoutHistory, Architecture):
    """n = ``model.gated_residual.rate`` streams. Both sub-layers of a layer, and the final norm, read them with gates of their own; a
    read replaces the pre-norm."""

    title = "Gated residual"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.rate, self.hidden = config.gated_residual.rate, config.hidden_size
        self.bottleneck = max(1, self.hidden // BOTTLENECK)

    def check(self) -> None:
        """The configuration's own types are enough."""

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return self.rate, self.hidden

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.gated_residual.layer import GatedResidualLayer

        return GatedResidualLayer(self.config, self.rate, self.bottleneck)

    def make_final_norm(self) -> nn.Module:
        from lime_dist.model.architectures.gated_residual.layer import FinalRead

        return FinalRead(self.rate, self.hidden, self.bottleneck, self.config.rms_norm_eps)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        """Every stream starts as the embedding."""
        return embedded_BTD.unsqueeze(-2).expand(-1, -1, self.rate, -1)

    def last_output(self, hidden: Tensor) -> Tensor:
        return hidden

    # -- parameters ---------------------------------------------------------------------------------------------------

    def final_norm_parameters(self) -> Sizes:
        """Those of one read."""
        width = self.rate * self.hidden
        gates = {f"{name}_proj.weight": width * self.bottleneck for name in ("compress", "expand")}
        return {"norm.weight": width, **gates}

    def layer_parameters(self, layer: int) -> Sizes:
        connection = {**self.final_norm_parameters(), "write_proj.weight": self.rate**2 * self.hidden}
        return projection_parameters(self.config) | {
            f"{sublayer}_connection.{name}": size for sublayer in ("attn", "mlp") for name, size in connection.items()
        }

    def parameter_group(self, name: str) -> Group:
        return shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Like other matrices and norms."""
        initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def final_norm_flops(self) -> Flops:
        """Those of one read."""
        products = 2 * 2 * self.rate * self.hidden * self.bottleneck
        return Flops(products, 2 * products)

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        connection = self._connection_flops()
        return [transformer_flops(self.config, sequence_length) + connection + connection] * len(layers)

    def _connection_flops(self) -> Flops:
        write = 2 * self.rate**2 * self.hidden
        return self.final_norm_flops() + Flops(write, 2 * write)

    def _read(self, streams: int) -> Activations:
        """What a read keeps; ``streams``: of its input that are memory of their own."""
        # Input, normed streams, gates; before and after SiLU. Root mean squares.
        kept = streams * self.hidden + 2 * self.rate * self.hidden + 2 * self.bottleneck
        return Activations(per_token=kept, accumulated_per_token=self.rate)

    def final_norm_activation_bytes(self, num_tokens: int, itemsize: int) -> int:
        return self._read(self.rate).nbytes(num_tokens, itemsize)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        streams = self.rate if layer > 0 else 1  # they start as views of one embedding
        kept = Activations(per_token=streams * self.hidden)  # the layer's input
        if not checkpointing:
            kept = self._connection(streams) + self._connection(self.rate) + transformer_activations(self.config)
        return kept.nbytes(num_tokens, itemsize)

    def _connection(self, streams: int) -> Activations:
        """What a connection keeps: of its read, its gates, and the input and output of its sub-layer."""
        return self._read(streams) + Activations(per_token=2 * self.hidden + 2 * self.rate)

    def feed_forward_activations(self) -> Activations:
        """The MLP's connection is computed again from the streams."""
        kept = Activations(per_token=4 * self.config.intermediate_size - self.rate * self.hidden)
        return kept + self._connection(self.rate)

    def feed_forward_flops(self, defers_weights: bool) -> float:
        return self._connection_flops().forward + super().feed_forward_flops(defers_weights=True)

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        section = self.config.gated_residual.model_dump(mode="json")
        values = {"architecture": "gated_residual", "gated_residual": section}
        return ExportFormat("LimeForCausalLM", values, "LimeModel", "gated_residual_lime.py")

    def check_llama_start(self) -> None:
        raise ValueError("model.architecture=gated_residual cannot start from a LLaMA; use llama or lime")
