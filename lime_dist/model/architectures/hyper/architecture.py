"""The object that describes Hyper-Connections."""

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

DYNAMIC_LEAVES = ("dynamic_alpha", "dynamic_beta")
STATIC_LEAVES = ("static_alpha", "static_beta", "alpha_scale", "beta_scale")


class Hyper(WithoutHistory, Architecture):
    """n = ``model.hyper.rate`` streams; both sub-layers of a layer have a connection. The norms have no weights."""

    title = "Hyper-Connections"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def check(self) -> None:
        """The configuration's own types are enough."""

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return self.config.hyper.rate, self.config.hidden_size

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.hyper.layer import HyperDecoderLayer

        return HyperDecoderLayer(self.config)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        """Every stream starts as the embedding."""
        return embedded_BTD.unsqueeze(-2).expand(-1, -1, self.config.hyper.rate, -1)

    def last_output(self, hidden: Tensor) -> Tensor:
        """The streams are summed."""
        return hidden.sum(-2)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        rate, hidden = self.config.hyper.rate, self.config.hidden_size
        connection = {"static_alpha": rate * (rate + 1), "static_beta": rate}
        if self.config.hyper.dynamic:
            connection |= {"dynamic_alpha": hidden * (rate + 1), "dynamic_beta": hidden}
            connection |= {"alpha_scale": 1, "beta_scale": 1}
        connections = {
            f"{name}_connection.{leaf}": size for name in ("attn", "mlp") for leaf, size in connection.items()
        }
        return projection_parameters(self.config) | connections

    def parameter_group(self, name: str) -> Group:
        leaf = name.rpartition(".")[2]
        if leaf in DYNAMIC_LEAVES:
            return "routers"
        return "plain" if leaf in STATIC_LEAVES else shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Static α = [e_{k mod n} | I_n] in layer k and β = 1_n: a pre-norm decoder; the dynamic part starts at 0, scaled
        by 0.01."""
        leaf = name.rpartition(".")[2]
        if leaf not in STATIC_LEAVES + DYNAMIC_LEAVES:
            initialise_shared(self.config, name, value, generator)
            return
        value.fill_({"static_beta": 1.0, "alpha_scale": 0.01, "beta_scale": 0.01}.get(leaf, 0.0))
        if leaf == "static_alpha":
            layer = int(name.split(".")[2])
            value[layer % len(value), 0] = 1.0
            value[:, 1:].fill_diagonal_(1.0)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: int, layers: range, prices: Prices) -> list[Flops]:
        rate, dynamic = self.config.hyper.rate, self.config.hyper.dynamic
        mixing = 2 * 2 * rate * self.config.hidden_size * (rate + 1 + (rate + 2 if dynamic else 0))
        return [transformer_flops(self.config, sequence_length) + Flops(mixing, 2 * mixing)] * len(layers)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        hidden, rate = self.config.hidden_size, self.config.hyper.rate
        streams = rate if layer > 0 else 1  # they start as views of one embedding
        if checkpointing:
            return Activations(per_token=streams * hidden).nbytes(num_tokens, itemsize)
        kept = transformer_activations(self.config) + self._connection(streams) + self._connection(rate)
        if self.config.hyper.dynamic:
            kept += Activations(fixed=2 * hidden * (rate + 2))  # alpha beside beta, in both connections
        return kept.nbytes(num_tokens, itemsize)

    def _connection(self, streams: int) -> Activations:
        """What one connection keeps; ``streams``: of its input that are memory of their own."""
        rate, hidden = self.config.hyper.rate, self.config.hidden_size
        kept = (streams + rate + 1) * hidden  # input, mixtures
        kept += 2 * hidden + 2  # input and output of the sub-layer, mean and deviation (on a GPU in float32)
        if self.config.hyper.dynamic:
            kept += rate * (hidden + 2)  # normed streams, mean and deviation
            kept += rate * (rate + 2) + rate * (rate + 1) + rate  # tanh, alpha, beta
        return Activations(per_token=kept)

    def received_activation_bytes(self, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        if checkpointing or self.config.hyper.dynamic:
            return 0
        return (
            num_tokens * itemsize * self.config.hyper.rate * self.config.hidden_size
        )  # the first layer transposes them

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        values = {"architecture": "hyper", "hyper": self.config.hyper.model_dump(mode="json")}
        return ExportFormat("LimeForCausalLM", values, "LimeModel", "hyper_lime.py")

    def check_llama_start(self) -> None:
        raise ValueError("model.architecture=hyper cannot start from a LLaMA; use llama or lime")
