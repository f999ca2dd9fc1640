"""The object that describes mixture-of-depths attention (MoDA, arXiv 2603.15619).

Attention of layer ℓ at token t is one softmax:

    o = softmax([ q·K_ℓ[≤ t] , q·K_e[t] for every entry e that the layer reads ] / √d) · [ V_ℓ[≤ t] ; V_e[t] ]

An entry is the slot of an earlier layer, with the keys and values of its attention and with ``mlp_entries`` a second pair, projected
from the input of its MLP; or a row of a chunk's summary, Σ_i A_m[row, i]·slot_i. The keys K_e are those that layer e itself uses. So
query and key are rotated alike at one token, and the rotations cancel, as in the paper's equation; the authors' code rotates the
query alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.model.architecture import CHUNKS, ExportFormat, Flops, Sizes, mean_weights_name, stage_layout
from lime_dist.model.architectures.lime.lime import Lime
from lime_dist.model.crossing import Prices, sources_of_readers
from lime_dist.model.layout import BLOCK, StageLayout
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

SLICE_ELEMENTS_GPU = 1 << 27
"""Elements of keys [C, n, G, d] that are read at a time on a GPU."""
SLICE_TOKENS = 64
"""Least number of tokens in a slice, so that products do not become too small."""


class DepthAttentionLime(Lime):
    """``routes: kv`` with ``depth_attention: moda``. Weights depend on the query, so entries cross boundaries and no parts of
    mixtures: the queries of later layers do not exist yet."""

    title = "MoDA"
    max_block_layers = BLOCK
    receives_in_place = True
    summary_heads = 1
    sums_sent_gradients = True
    needs_tensor_mask = True
    router_map_obstacle = "its weights depend on the token"
    has_mean_map = True
    slot_name = "keys"

    def check(self) -> None:
        """The configuration's own types are enough."""

    def entries_read(self, layer: int) -> int:
        return 0

    @property
    def pairs(self) -> int:
        """Pairs of a key and a value in an entry, for each head."""
        return 2 if self.config.lime.mlp_entries else 1

    @property
    def entry_width(self) -> int:
        return self.pairs * 2 * self.config.key_value_heads * self.config.head_size

    def columns(self, layer: int) -> int:
        """Pairs of a key and a value that a layer reads beside the sequence, for each head."""
        return self.pairs * (len(self.policy.reads(layer)) - 1)

    @cached_property
    def layers_read(self) -> frozenset[int]:
        """The layers whose slots a later layer or a summary reads."""
        sources = sources_of_readers(self.policy, self.config.num_hidden_layers)
        return frozenset(entry.layer for reader, read in sources.items() for entry in read if entry != reader)

    def has_mlp_entry(self, layer: int) -> bool:
        """Whether a layer projects keys and values from the input of its MLP."""
        return self.config.lime.mlp_entries and layer in self.layers_read

    def history_gradient_itemsize(self, itemsize: int) -> int:
        return accumulation_itemsize(itemsize)

    # -- modules ------------------------------------------------------------------------------------------------------

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.lime.depth.layer import DepthAttentionLayer

        return DepthAttentionLayer(self.config, layer, self.has_mlp_entry(layer))

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        from lime_dist.model.architectures.lime.depth.history import DepthKeyValueHistory

        config = self.config
        return DepthKeyValueHistory(
            layout, self.pairs, config.key_value_heads, config.head_size, num_tokens, dtype, device, lead
        )

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        sizes = projection_parameters(self.config) | norm_parameters(self.config)
        if self.has_mlp_entry(layer):
            keys = self.config.hidden_size * self.config.key_value_heads * self.config.head_size
            sizes |= {"mlp.k_proj.weight": keys, "mlp.v_proj.weight": keys}
        return sizes

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """A_m: orthonormal rows over the chunk's layers, so that a summary's keys are as large as a layer's. The rest:
        `initialise_shared`."""
        if name.startswith(CHUNKS):
            import torch

            rows, size = value.shape
            basis, _ = torch.linalg.qr(torch.randn(size, rows, generator=generator, dtype=torch.float64))
            value.copy_(basis.t())
        else:
            initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        """Beside the transformer, for each pair of a key and a value: score and product with the value; in backward the score
        again, and the gradients of the share, the value, the query and the key. Projections of MLPs; summaries."""
        config = self.config
        unit = 2 * 2 * config.num_attention_heads * config.head_size
        width = config.key_value_heads * config.head_size
        fixed = transformer_flops(config, sequence_length)
        result = []
        for layer in layers:
            projections = 2 * 2 * config.hidden_size * width if self.has_mlp_entry(layer) else 0
            products = projections
            if (chunk := self.chunks.get(layer)) is not None:
                products += 2 * chunk.num_rows * len(chunk.layers) * self.entry_width
            depth = unit * self.columns(layer)
            result.append(fixed + Flops(depth + products, 2.5 * depth + 2 * products, projections))
        return result

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Keys and values are in the history."""
        if checkpointing:
            return Activations(per_token=self.config.hidden_size).nbytes(num_tokens, itemsize)
        kept = transformer_activations(self.config) + norm_activations(self.config)
        kept += Activations(per_token=-2 * self.config.key_value_heads * self.config.head_size)
        if self.config.numerics.qk_norm and self.has_mlp_entry(layer):  # keys before the norm; root mean squares
            heads = self.config.key_value_heads
            kept += Activations(heads * self.config.head_size, heads)
        return kept.nbytes(num_tokens, itemsize)

    def feed_forward_activations(self) -> Activations:
        """The norm's output is kept: keys and values are made from it, too."""
        return Activations(4 * self.config.intermediate_size)

    def weight_pass_bytes(self, layer: int, num_tokens: int, itemsize: int) -> int:
        """Those of the MLP's keys and values are made from its input, which is kept anyway, and from their gradients."""
        kept = weight_pass_activations(self.config)
        if self.has_mlp_entry(layer):
            kept += Activations(per_token=2 * self.config.key_value_heads * self.config.head_size)
        return kept.nbytes(num_tokens, itemsize)

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """Queries, gradients of outputs, shares and gradients of scores of a block that reads older entries together."""
        layout = stage_layout(self.config, layers)
        assert layout is not None
        columns = self.pairs * len(layout.blocks[block.start].older)
        if not columns:
            return 0
        per_head = 2 * (columns + self.config.head_size)
        return len(block) * self.config.num_attention_heads * per_head * num_tokens * itemsize

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """What a slice of tokens adds to the gradients of keys or of values that the block's last layer reads alone."""
        heads, size = self.config.key_value_heads, self.config.head_size
        shared = set.intersection(*(set(self.policy.reads(layer)) for layer in block)) if len(block) > 1 else set()
        columns = self.columns(block[-1]) - self.pairs * sum(entry.layer < block.start for entry in shared)
        if not columns:
            return 0
        slice_tokens = min(num_tokens, max(SLICE_TOKENS, SLICE_ELEMENTS_GPU // (columns * heads * size)))
        return columns * heads * size * slice_tokens * accumulation_itemsize(itemsize)

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        """What the stage makes and sends is copied; a layer reads keys and values once each, which is once an entry."""
        layout = stage_layout(self.config, *parts, prices=prices)
        assert layout is not None
        sources = sum(len(chunk.layers) for chunk in layout.chunks)
        read = sum(len(self.policy.reads(layer)) - 1 for layer in layout.layers)
        return 2.0 * (len(layout.own) + len(layout.outgoing)) + sources + read

    # -- pictures of routers ------------------------------------------------------------------------------------------

    @property
    def router_parameters(self) -> Sequence[str]:
        return self.summary_names

    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """From mean shares of attention; the own slot stands for the sequence. A summary's share is divided among the layers of its chunk
        by its weights."""
        import torch

        reads = self.policy.reads(layer)
        if len(reads) == 1:
            shares = torch.ones(self.config.num_attention_heads, 1)
        else:
            shares = weights[mean_weights_name(layer)].float()
        total = torch.zeros(len(shares), self.config.num_hidden_layers)
        for entry, share in zip(reads, shares.t(), strict=True):
            parts = torch.ones(1)
            if entry.is_summary:
                parts = weights[f"{CHUNKS}{self.chunks[entry.layer].index}.weight"][entry.row].float().abs()
            total[:, entry.layers.start : entry.layers.stop] += share.unsqueeze(1) * (parts / parts.sum())
        return total

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        return ExportFormat("LimeForCausalLM", self.export_values, "LimeModel", "depth_attention_lime.py")

    def check_llama_start(self) -> None:
        raise ValueError(
            "model.lime.depth_attention=moda would not start as the original does: its softmax has more keys; set "
            "model.lime.depth_attention=none and model.lime.router_init=identity"
        )
