"""The object that describes value residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Architecture, ExportFormat, Flops, Group, Sizes, router_name
from lime_dist.model.chunks import Chunk
from lime_dist.model.crossing import Prices
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import FirstLastHistory, HistoryPolicy
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

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lime_dist.model.history import LayerHistory

ROUTER = "self_attn.router.weight"


class ValueResidual(Architecture):
    """Layer ℓ ≥ 1 attends to the values (1 − w)·v_ℓ + w·v_0 with w = ``model.value_residual.weight``, ½ in the paper's code.

    If they are ``learnable``, both factors are parameters of the layer, which start at 1 − w and w: its router. v_0 is the one
    entry of the history, and crosses every boundary.
    """

    title = "Value residual"
    policy: HistoryPolicy = FirstLastHistory(first=1, last=0)
    has_configurable_policy = False
    max_block_layers = 1
    receives_in_place = False
    can_offload_history = False  # its entry is what layer 0 keeps anyway

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def check(self) -> None:
        """The configuration's own types are enough."""

    # -- layer history and payload ------------------------------------------------------------------------------------

    @property
    def entry_width(self) -> int:
        return self.config.key_value_heads * self.config.head_size

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return (self.config.hidden_size,)

    def entries_read(self, layer: int) -> int:
        return 2 if layer > 0 and self.config.value_residual.learnable else 0

    def slots_kept(self, layer: int) -> int:
        return int(layer == 0)

    def history_gradient_itemsize(self, itemsize: int) -> int:
        """Autograd sums the gradient of v_0: see `block_gradient_bytes`."""
        return 0

    # -- modules ------------------------------------------------------------------------------------------------------

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.value_residual.layer import ValueResidualLayer

        return ValueResidualLayer(self.config, layer)

    def make_summary(self, chunk: Chunk) -> nn.Module:
        raise NotImplementedError("there are no summaries")

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        from lime_dist.model.architectures.value_residual.history import FirstValues

        return FirstValues(layout)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def last_output(self, hidden: Tensor) -> Tensor:
        return hidden

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        router = {ROUTER: self.entries_read(layer)} if self.entries_read(layer) else {}
        return projection_parameters(self.config) | norm_parameters(self.config) | router

    def summary_parameters(self, chunk: Chunk) -> int:
        raise NotImplementedError("there are no summaries")

    def parameter_group(self, name: str) -> Group:
        return "routers" if name.endswith(ROUTER) else shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The router starts at [w, 1 − w]."""
        if name.endswith(ROUTER):
            value[0] = self.config.value_residual.weight
            value[1] = 1 - self.config.value_residual.weight
        else:
            initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        return [transformer_flops(self.config, sequence_length)] * len(layers)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        if checkpointing:
            return Activations(per_token=self.config.hidden_size).nbytes(num_tokens, itemsize)
        kept = transformer_activations(self.config) + norm_activations(self.config)
        if layer == 0:
            kept += Activations(per_token=-self.entry_width)  # the history's entry
        elif self.config.value_residual.learnable:
            kept += Activations(per_token=self.entry_width)  # the layer's own values, for the gradient of their factor
        return kept.nbytes(num_tokens, itemsize)

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """The gradient of v_0, in at least float32."""
        return self.entry_width * num_tokens * accumulation_itemsize(itemsize)

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        return 0

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        """Both values are read, and their sum is written."""
        return 3.0 * sum(layer > 0 for layers in parts for layer in layers)

    # -- pictures of routers ------------------------------------------------------------------------------------------

    @property
    def router_map_obstacle(self) -> str | None:
        return None if self.config.value_residual.learnable else "its weights are fixed"

    @property
    def router_parameters(self) -> Sequence[str]:
        layers = range(self.config.num_hidden_layers)
        return [f"{router_name(layer)}.weight" for layer in layers if self.entries_read(layer)]

    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """One row: all heads have the same weights."""
        import torch

        row = torch.zeros(1, self.config.num_hidden_layers)
        if layer == 0:
            row[0, 0] = 1.0
        else:
            row[0, [0, layer]] = weights[f"{router_name(layer)}.weight"].float().abs()
        return row

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        values = {
            "architecture": "value_residual",
            "value_residual": self.config.value_residual.model_dump(mode="json"),
        }
        return ExportFormat("LimeForCausalLM", values, "LimeModel", "value_residual_lime.py")

    def check_llama_start(self) -> None:
        weight = self.config.value_residual.weight
        if weight != 0:
            raise ValueError(
                f"model.value_residual.weight={weight} would not start as the original does; set "
                "model.value_residual.weight=0 and model.value_residual.learnable=true"
            )
