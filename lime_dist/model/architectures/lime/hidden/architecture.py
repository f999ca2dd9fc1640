"""The object that describes LIMe over hidden states.

A slot is a layer's input. A layer ℓ ≥ ``start_layer`` mixes the normed states that it reads, per head, with softmax weights:
w_ℓ [H, entries] (``router: static``) or logits W_ℓ·x per token (``router: dynamic``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.model.architecture import CHUNKS, ExportFormat, Flops, Sizes, mean_weights_name, router_name
from lime_dist.model.architectures.lime.lime import RoutedLime
from lime_dist.model.crossing import Prices, crossings
from lime_dist.model.layout import BLOCK, StageLayout
from lime_dist.model.policies import Entry
from lime_dist.model.transformer import (
    Activations,
    initialise_shared,
    norm_activations,
    norm_parameters,
    projection_parameters,
    transformer_activations,
    transformer_flops,
    weight_pass_activations,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lime_dist.model.history import LayerHistory

BLOCK_ROWS, BLOCK_HEADS = 32, 8
"""Most rows (layer, head) of a block: their mixtures are in memory. With more than ``BLOCK_HEADS`` heads, writing and reading
these mixtures would move more memory than reading dozens of older entries again for every layer: a block is one layer then."""
SLICE_ELEMENTS_GPU = 1 << 27
"""Elements of a mixture [H, n, D] that are computed at a time on a GPU. Slices that fit its cache would mean kernels that take less
time than their launch (benchmarks/RESULTS.md); these are small enough not to need much memory."""
SLICE_TOKENS = 64
"""Least number of tokens in a slice, so that the matrix products do not become too thin."""


class HiddenLime(RoutedLime):
    """``routes: hidden``; multi-head attention only (G = H), since every head is routed by itself."""

    slot_name = "input"
    receives_in_place = False
    summary_heads = 1
    router_parts = ("weight",)

    @property
    def is_dynamic(self) -> bool:
        """Whether router weights depend on the token."""
        return self.config.lime.router == "dynamic"

    @property
    def prunes(self) -> bool:
        """Whether the smallest router weights are dropped."""
        return self.config.lime.top_p is not None and self.config.lime.top_p != 1

    def check(self) -> None:
        config = self.config
        if config.key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"model.num_key_value_heads={config.num_key_value_heads} must equal model.num_attention_heads="
                f"{config.num_attention_heads} with model.lime.routes=hidden, which routes every head by itself"
            )
        if config.lime.start_layer >= config.num_hidden_layers:
            raise ValueError(
                f"model.lime.start_layer={config.lime.start_layer} is past the last layer, "
                f"{config.num_hidden_layers - 1} (model.num_hidden_layers={config.num_hidden_layers})"
            )

    def reads(self, layer: int) -> tuple[Entry, ...]:
        return tuple(self.policy.reads(layer)) if layer >= self.config.lime.start_layer else ()

    @property
    def max_block_layers(self) -> int:
        heads = self.config.num_attention_heads
        return min(BLOCK, BLOCK_ROWS // heads) if heads <= BLOCK_HEADS else 1

    @property
    def entry_width(self) -> int:
        return self.config.hidden_size

    def history_gradient_itemsize(self, itemsize: int) -> int:
        return accumulation_itemsize(itemsize)

    # -- modules ------------------------------------------------------------------------------------------------------

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.lime.hidden.layer import HiddenLayer
        from lime_dist.model.architectures.lime.hidden.router import DynamicRouter, StaticRouter

        config, router = self.config, None
        if read := self.entries_read(layer):
            router = (
                DynamicRouter(config.num_attention_heads, read, config.hidden_size)
                if self.is_dynamic
                else StaticRouter(config.num_attention_heads, read, config.lime.top_p)
            )
        return HiddenLayer(config, layer, router)

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        from lime_dist.model.architectures.lime.hidden.history import HiddenHistory

        return HiddenHistory(layout, num_tokens, self.config.hidden_size, self.config.rms_norm_eps, dtype, device)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        sizes = projection_parameters(self.config) | norm_parameters(self.config)
        if read := self.entries_read(layer):
            per_weight = self.config.hidden_size if self.is_dynamic else 1
            sizes["history_layernorm.weight"] = self.config.hidden_size
            sizes["self_attn.router.weight"] = self.config.num_attention_heads * read * per_weight
        return sizes

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """w_ℓ ~ N(0, 0.1²), W_ℓ ~ N(0, 0.02²), logits of summaries N(0, 0.1²). The rest: `initialise_shared`."""
        if name.startswith(CHUNKS):
            value.normal_(0.0, 0.1, generator=generator)
        elif ".router." in name:
            value.normal_(0.0, 0.02 if self.is_dynamic else 0.1, generator=generator)
        else:
            initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        """Beside the transformer: mixing states per head; in backward the gradients of weights and of entries, and the
        mixtures again. Dynamic weights come from logits, which are products as well."""
        unit = 2 * self.config.num_attention_heads * self.config.hidden_size
        forward, backward = (2, 2 + 3) if self.is_dynamic else (1, 3)
        fixed = transformer_flops(self.config, sequence_length)
        counts = [self.entries_read(layer) for layer in layers]
        mixed = 2 * self.config.hidden_size * self.entry_projections  # weight gradients that are made with the mixtures
        return [
            fixed + Flops(forward * unit * read, backward * unit * read, -mixed if read else 0.0) for read in counts
        ]

    @property
    def entry_projections(self) -> int:
        """Rows with which a layer projects keys and values from mixtures, if it has a router."""
        return 2 * self.config.key_value_heads * self.config.head_size

    def weight_pass_bytes(self, layer: int, num_tokens: int, itemsize: int) -> int:
        """A layer with a router makes the weight gradients of its keys and values at once."""
        kept = weight_pass_activations(self.config)
        if self.entries_read(layer):
            kept += Activations(per_token=-self.entry_projections)
        return kept.nbytes(num_tokens, itemsize)

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        kept = Activations(per_token=self.config.hidden_size)  # the layer's input
        if not checkpointing:
            kept = transformer_activations(self.config, keeps_keys=self.entries_read(layer) > 0)
            kept += norm_activations(self.config) + self._read_activations(layer)
            kept += Activations(per_token=self.config.hidden_size)  # the normed input before the norm's weight
        kept += self._router_activations(layer) + self._summary_activations(layer)
        return kept.nbytes(num_tokens, itemsize)

    def _read_activations(self, layer: int) -> Activations:
        """What a layer with a router keeps of its read."""
        read, hidden = self.entries_read(layer), self.config.hidden_size
        if not read:
            return Activations()
        kept = Activations(
            per_token=hidden,  # mixed keys, in one piece of memory with the values
            fixed=2 * 2 * hidden * hidden,  # projections of keys and values, without and with the norm's weight
        )
        if self.is_dynamic:  # input under the history norm, weights
            kept += Activations(per_token=hidden + self.config.num_attention_heads * read)
        return kept

    def _router_activations(self, layer: int) -> Activations:
        """Static weights are made outside of the layer; pruned ones with their mask, result and sums."""
        read = self.entries_read(layer)
        if not read or self.is_dynamic:
            return Activations()
        return Activations(fixed=self.config.num_attention_heads * (3 * read + 1 if self.prunes else read))

    def _summary_activations(self, layer: int) -> Activations:
        """A summary before its norm, its root mean square, its weights."""
        if layer not in self.chunks:
            return Activations()
        chunk = self.chunks[layer]
        return Activations(
            accumulated_per_token=chunk.num_rows * (self.config.hidden_size + 1),
            accumulated_fixed=chunk.num_rows * len(chunk.layers),
        )

    def received_activation_bytes(self, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Received entries are copied into the history, whose memory is apart."""
        hidden, accumulated = self.config.hidden_size, accumulation_itemsize(itemsize)
        live = crossings(self.policy, self.config.num_hidden_layers)[boundary].entries
        slots = sum(not entry.is_summary for entry in live)
        kept = itemsize * len(live) * hidden + accumulated * slots  # entries; roots of the states' mean squares
        return num_tokens * kept

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """Static weights: mixtures of a block of several layers and their gradients."""
        if not self._reads_of_block(block):
            return 0
        return 2 * len(block) * self.config.num_attention_heads * self.config.hidden_size * num_tokens * itemsize

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """A mixture of a slice of tokens, its gradient, and what it adds to the gradients of entries; dynamic weights and their
        gradients."""
        read = self.entries_read(block[-1])
        if not read:
            return 0
        heads, hidden = self.config.num_attention_heads, self.config.hidden_size
        accumulated = accumulation_itemsize(itemsize)
        slice_tokens = min(num_tokens, max(SLICE_TOKENS, SLICE_ELEMENTS_GPU // (heads * hidden)))
        of_slice = 2 * heads * hidden * slice_tokens * itemsize
        if self.is_dynamic:
            return (
                heads * read * num_tokens * (itemsize + accumulated)
                + of_slice
                + read * hidden * slice_tokens * accumulated
            )
        converted = accumulated if itemsize < accumulated else 0  # else the product is added where the sum lies
        older = len(self._reads_of_block(block))
        return max(
            of_slice + (read - older) * hidden * slice_tokens * converted, older * hidden * num_tokens * converted
        )

    def _reads_of_block(self, block: range) -> set[Entry]:
        """The older entries that all layers of a block read together."""
        if self.is_dynamic or len(block) == 1 or not any(self.reads(layer) for layer in block):
            return set()
        shared = set.intersection(*(set(self.policy.reads(layer)) for layer in block))
        return {entry for entry in shared if entry.layer < block.start}

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        """Slots are written; mixtures, a state for every head, are written and read. With static weights a layer reads its
        block's share of older entries."""
        return sum(map(self._moved_by_layer, chain.from_iterable(parts)))

    def _moved_by_layer(self, layer: int) -> float:
        read, block = float(self.entries_read(layer)), self.max_block_layers
        if not self.is_dynamic:
            read = min(read, block / 2 + read / block)
        return 2 + read + 2 * self.config.num_attention_heads

    # -- pictures of routers ------------------------------------------------------------------------------------------

    @property
    def router_map_obstacle(self) -> str | None:
        return "its weights depend on the token" if self.is_dynamic else None

    @property
    def has_mean_map(self) -> bool:
        return self.is_dynamic

    @property
    def router_parameters(self) -> Sequence[str]:
        return self.summary_names if self.is_dynamic else super().router_parameters

    def router_matrix(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """Summaries are normed before they are read; a map leaves that aside."""
        import torch

        from lime_dist.model.architectures.lime.hidden.router import prune

        if layer < self.config.lime.start_layer:
            return torch.ones(self.config.num_attention_heads, 1)
        if self.is_dynamic:
            return weights[mean_weights_name(layer)].float()
        matrix = weights[f"{router_name(layer)}.weight"].float().softmax(-1)
        return prune(matrix, self.config.lime.top_p) if self.prunes and self.config.lime.top_p is not None else matrix

    def summary_row(self, weight: Tensor, summary: Tensor, entry: Entry) -> Tensor:
        return weight.unsqueeze(1) * summary[entry.row].softmax(-1).view(1, -1, 1)

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        return ExportFormat("LimeForCausalLM", self.export_values, "LimeModel", "hidden_lime.py")

    def check_llama_start(self) -> None:
        lime = self.config.lime
        raise ValueError(
            f"model.lime.routes={lime.routes}, model.lime.router_init={lime.router_init} would not start as the "
            "original does; set model.lime.routes=kv and model.lime.router_init=identity"
        )
