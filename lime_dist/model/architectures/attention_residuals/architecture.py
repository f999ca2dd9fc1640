"""The object that describes attention residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Architecture, ExportFormat, Flops, Group, Sizes, mean_weights_name
from lime_dist.model.architectures.attention_residuals.blocks import GROUP, Blocks
from lime_dist.model.chunks import Chunk
from lime_dist.model.crossing import Prices
from lime_dist.model.layout import StageLayout
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

SLICE_ELEMENTS_GPU = 1 << 27
"""Elements of entries [E, n, D] that are read at a time on a GPU."""
SLICE_TOKENS = 64
"""Least number of tokens in a slice, so that products do not become too small."""


class AttentionResiduals(Architecture):
    """Sub-layer j takes h_j = Σ_i a_i·v_i with a = softmax_i(w_jᵀ·RMSNorm_j(v_i)). The v_i are the embedding, the sums of the
    outputs of finished blocks of ``block_size`` sub-layers, and the sum of the own block so far. One more read comes before the
    final norm. Queries w start at 0, so that every read starts as the mean.
    """

    title = "Attention Residuals"
    has_configurable_policy = False
    max_block_layers = GROUP // 2
    receives_in_place = True
    router_map_obstacle = "its weights depend on the token"
    has_mean_map = True
    first_column = -1
    row_kind = "read"
    router_parameters: Sequence[str] = ()

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @cached_property
    def policy(self) -> Blocks:
        return Blocks(self.config.attention_residuals.block_size)

    def check(self) -> None:
        """Every configuration is possible: a block may be larger than the model."""

    @property
    def entry_width(self) -> int:
        return self.config.hidden_size

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return (self.config.hidden_size,)

    def entries_read(self, layer: int) -> int:
        return 0

    def slots_kept(self, layer: int) -> int:
        """Blocks that are finished before one of its sub-layers."""
        return sum(self.policy.begins(sublayer) for sublayer in (2 * layer, 2 * layer + 1))

    def history_gradient_itemsize(self, itemsize: int) -> int:
        return accumulation_itemsize(itemsize)

    # -- modules ------------------------------------------------------------------------------------------------------

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.attention_residuals.layer import AttentionResidualsLayer

        return AttentionResidualsLayer(self.config, layer, self.policy, self._is_last(layer))

    def make_summary(self, chunk: Chunk) -> nn.Module:
        raise NotImplementedError("attention residuals have no summaries")

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        from lime_dist.model.architectures.attention_residuals.history import DepthHistory

        hidden, eps = self.config.hidden_size, self.config.rms_norm_eps
        return DepthHistory(layout, self.policy, num_tokens, hidden, eps, dtype, device, lead)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def last_output(self, hidden: Tensor) -> Tensor:
        """The last layer makes the last read."""
        return hidden

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        reads = ["mlp_residual"]
        reads += ["attn_residual"] if layer > 0 else []
        reads += ["output_residual"] if self._is_last(layer) else []
        hidden = self.config.hidden_size
        queries = {f"{read}.{leaf}": hidden for read in reads for leaf in ("query", "key_layernorm.weight")}
        return projection_parameters(self.config) | norm_parameters(self.config) | queries

    def summary_parameters(self, chunk: Chunk) -> int:
        raise NotImplementedError("attention residuals have no summaries")

    def parameter_group(self, name: str) -> Group:
        """Queries learn at the rate of the model, as in the paper: they have D components, and 10 times the rate would saturate
        the softmax within a few steps."""
        return "plain" if name.endswith("_residual.query") else shared_parameter_group(name)

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        if name.endswith("_residual.query"):
            value.zero_()
        else:
            initialise_shared(self.config, name, value, generator)

    # -- costs --------------------------------------------------------------------------------------------------------

    def _is_last(self, layer: int) -> bool:
        return layer == self.config.num_hidden_layers - 1

    def _finished(self, layer: int) -> list[int]:
        """By read of a layer: the number of finished blocks that it chooses from."""
        reads = [self.policy.finished(sublayer) for sublayer in (2 * layer, 2 * layer + 1) if sublayer > 0]
        return [*reads, self.policy.finished_at_end(self.config.num_hidden_layers)] if self._is_last(layer) else reads

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        """Beside the transformer, for each finished block: score and mixture; in backward the score again, and the gradients of the
        weight, of the block through its value and its key, and of the query. The running sum is elementwise work."""
        unit = 2 * self.config.hidden_size
        fixed = transformer_flops(self.config, sequence_length)
        return [fixed + Flops(2 * unit * read, 5 * unit * read) for read in (sum(self._finished(i)) for i in layers)]

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        hidden = self.config.hidden_size
        kept = Activations(per_token=hidden)  # the running sum that the layer takes
        if not checkpointing:
            kept = transformer_activations(self.config) + norm_activations(self.config)
            running = 2 - self.slots_kept(layer) + self._is_last(layer)
            kept += Activations(per_token=running * hidden, accumulated_per_token=len(self._finished(layer)))
        kept += Activations(accumulated_per_token=self.slots_kept(layer))  # root mean squares of blocks
        return kept.nbytes(num_tokens, itemsize)

    def received_activation_bytes(self, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Root mean squares of the blocks; and the running sum, which lies in the memory of the history, if its block is finished
        and copied there."""
        kept = accumulation_itemsize(itemsize) * len(self.policy.reads(boundary - 1))
        if self.policy.begins(2 * boundary) and not checkpointing:
            kept += itemsize * self.config.hidden_size
        return num_tokens * kept

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """The gradients of a group's mixtures; with checkpointing the mixtures themselves."""
        (layer,) = block
        kept = itemsize + (accumulation_itemsize(itemsize) if checkpointing else 0)
        readers = max(len(self._readers(layers, sublayer)) for sublayer in (2 * layer, 2 * layer + 1))
        return readers * self.config.hidden_size * num_tokens * kept

    def feed_forward_history_bytes(
        self, layers: range, layer: int, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """Of a group, with checkpointing mixtures, and gradients of mixtures once one of its reads has been visited; and the
        gradients of blocks, once a later stage has sent some or a product of reads has been differentiated."""
        state, wide = num_tokens * self.config.hidden_size, accumulation_itemsize(itemsize)
        readers, visited = self._readers(layers, 2 * layer + 1), range(2 * layer + 2, self._end(layers))
        needed = len(readers) * wide if checkpointing else 0
        needed += len(readers) * itemsize if visited and visited[0] in readers else 0
        if layers.stop < self.config.num_hidden_layers or any(self._spreads(layers, reader) for reader in visited):
            needed += self.policy.finished(2 * layers.stop - 1) * wide
        return state * needed

    def _end(self, layers: range) -> int:
        """One more than the last reader of a stage; the last read joins the last sub-layer."""
        return 2 * layers.stop + self._is_last(layers[-1])

    def _readers(self, layers: range, sublayer: int) -> range:
        """The readers of a stage that share a product with one."""
        group = self.policy.group(min(sublayer, 2 * layers.stop - 1))
        stop = self._end(layers) if group.stop >= 2 * layers.stop else group.stop
        return range(max(1, group.start, 2 * layers.start), stop)

    def _spreads(self, layers: range, reader: int) -> bool:
        """Whether the visit of a reader adds to the gradients of blocks: of those finished since the group's first reader, or of all
        older ones if it is the first."""
        readers = self._readers(layers, reader)
        finished = self.policy.finished(min(reader, 2 * layers.stop - 1))
        return reader == readers[0] or finished > self.policy.finished(readers[0])

    def backward_blocks(self, layers: range) -> list[range]:
        """A layer each: a group may begin or end in the middle of a layer."""
        return [range(layer, layer + 1) for layer in layers]

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """What a slice of tokens adds to the gradients of the blocks. The first reader of a group comes last in backward, for all of
        them, when their mixtures are no longer needed."""
        (layer,) = block
        hidden, wide, most = self.config.hidden_size, accumulation_itemsize(itemsize), 0
        for reader in {2 * layer, 2 * layer + 1} - {0}:
            readers, entries = self._readers(layers, reader), self.policy.finished(reader)
            is_first = reader == readers[0]
            entries -= 0 if is_first else self.policy.finished(readers[0])
            slice_tokens = min(num_tokens, max(SLICE_TOKENS, SLICE_ELEMENTS_GPU // (max(1, entries) * hidden)))
            freed = len(readers) * hidden * num_tokens * wide if is_first and checkpointing else 0
            most = max(most, entries * hidden * slice_tokens * wide - freed)
        return most

    def received_gradient_bytes(self, entries: int, num_tokens: int, itemsize: int) -> int:
        """The gradients of the blocks, and of one of them in the precision of sums, twice."""
        return self.config.hidden_size * num_tokens * (entries * itemsize + 2 * accumulation_itemsize(itemsize))

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        """Blocks are written once. A group reads older ones twice, for scores and mixtures; its mixtures are written and read."""
        moved = 0.0
        for layer in chain.from_iterable(parts):
            finished = self._finished(layer)
            moved += self.slots_kept(layer) + sum(2 * read / GROUP for read in finished) + 2 * len(finished)
        return moved

    # -- pictures of routers ------------------------------------------------------------------------------------------

    def row_name(self, layer: int, row: int) -> str:
        """Layer 0 chooses only before its MLP."""
        return ("attention", "MLP", "last read")[row + (layer == 0)]

    def column_name(self, layer: int, column: int) -> str:
        return self.policy.name(column, self.config.num_hidden_layers)

    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """The mean weight of the outputs of every layer, for each read. A block is a sum, so its weight is that of every output in it;
        of an own layer, only the outputs count that the read can see."""
        import torch

        means = weights[mean_weights_name(layer)]
        if layer == 0:  # attention reads the embedding alone
            means = torch.cat([torch.eye(1, means.shape[1], dtype=means.dtype), means])
        read = torch.zeros(len(means), self.config.num_hidden_layers + 1)
        for row, of_blocks in enumerate(means):
            of_outputs = of_blocks[[self.policy.finished(sublayer) for sublayer in range(2 * layer + row)]]
            read[row, 0] = of_blocks[0]
            for index in range(0, len(of_outputs), 2):
                read[row, 1 + index // 2] = of_outputs[index : index + 2].mean()
        return read

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        values = {
            "architecture": "attention_residuals",
            "attention_residuals": self.config.attention_residuals.model_dump(mode="json"),
        }
        return ExportFormat("LimeForCausalLM", values, "LimeModel", "attention_residuals_lime.py")

    def check_llama_start(self) -> None:
        raise ValueError("model.architecture=attention_residuals cannot start from a LLaMA; use llama or lime")
