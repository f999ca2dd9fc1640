"""What all kinds of LIMe share: the history policy, how an export describes what layers read, and pictures of routers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import CHUNKS, Architecture, Group, chunk_ends, router_name
from lime_dist.model.chunks import Chunk
from lime_dist.model.policies import Entry, HistoryPolicy, make_policy
from lime_dist.model.transformer import shared_parameter_group

if TYPE_CHECKING:
    from torch import Tensor, nn


class Lime(Architecture):
    """A decoder whose layers read what earlier layers left, as far as ``model.lime.history`` says."""

    title = "LIMe"
    has_configurable_policy = True

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @cached_property
    def policy(self) -> HistoryPolicy:
        return make_policy(self.config.lime)

    @cached_property
    def chunks(self) -> Mapping[int, Chunk]:
        """The chunks that are summarised, by their last layer."""
        return chunk_ends(self.config)

    def slots_kept(self, layer: int) -> int:
        return 1

    @property
    @abstractmethod
    def summary_heads(self) -> int:
        """Heads of a slot, to which a summary applies weights of their own."""

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return (self.config.hidden_size,)

    def make_summary(self, chunk: Chunk) -> nn.Module:
        from lime_dist.model.summaries import ChunkSummary

        return ChunkSummary(chunk.num_rows * self.summary_heads, len(chunk.layers) * self.summary_heads)

    def summary_parameters(self, chunk: Chunk) -> int:
        return self.summary_heads**2 * chunk.num_rows * len(chunk.layers)

    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def last_output(self, hidden: Tensor) -> Tensor:
        return hidden

    # -- pictures of routers ------------------------------------------------------------------------------------------

    slot_name: str
    """What a slot has of its layer, where the weights with which it is read depend on the token."""

    @property
    def summary_names(self) -> Sequence[str]:
        """Exported names of the weights of summaries."""
        return [f"{CHUNKS}{chunk.index}.weight" for chunk in self.chunks.values()]

    def column_name(self, layer: int, column: int) -> str:
        entry = self.policy.reads(layer)[column]
        if entry.is_summary:
            return f"summary {entry.row} of layers {entry.layers.start} to {entry.layers.stop - 1}"
        return f"{self.slot_name} of layer {entry.layer}"

    # -- parameters ---------------------------------------------------------------------------------------------------

    def parameter_group(self, name: str) -> Group:
        return "routers" if ".router." in name or name.startswith(CHUNKS) else shared_parameter_group(name)

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_values(self) -> dict[str, Any]:
        """Keys of an export's ``config.json``. What every layer reads stands there, so that modelling code knows no policies."""
        chunks = list(self.chunks.values())
        return {
            "architecture": "lime",
            "lime": self.config.lime.model_dump(mode="json"),
            "reads": [_runs(self.policy.reads(layer), chunks) for layer in range(self.config.num_hidden_layers)],
            "chunks": [[chunk.layers.start, chunk.layers.stop, chunk.num_rows] for chunk in chunks],
        }


class RoutedLime(Lime):
    """LIMe whose layers have routers: weights with which they mix entries."""

    @abstractmethod
    def reads(self, layer: int) -> tuple[Entry, ...]:
        """The entries that a layer mixes with its router's weights; empty: it has no router."""

    def entries_read(self, layer: int) -> int:
        return len(self.reads(layer))

    # -- pictures of routers ------------------------------------------------------------------------------------------

    @property
    def router_parameters(self) -> Sequence[str]:
        routers = [
            f"{router_name(layer)}.{part}"
            for layer in range(self.config.num_hidden_layers)
            for part in self.router_parts
        ]
        return [*routers, *self.summary_names]

    @property
    @abstractmethod
    def router_parts(self) -> Sequence[str]:
        """Names of the parameters that a router may have, in the order of its columns."""

    @abstractmethod
    def router_matrix(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """What a layer weighs its entries with, [heads, entries read · heads of an entry]; without a router: its own slot."""

    @abstractmethod
    def summary_row(self, weight: Tensor, summary: Tensor, entry: Entry) -> Tensor:
        """The weights for the slots of a summary's chunk, [heads, layers of the chunk, heads of a slot].

        Args:
            weight: what the layer weighs the summary's row with, [heads, heads of a row].
            summary: the summary's own weights.
        """

    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        import torch

        matrix, reads = self.router_matrix(weights, layer), self.policy.reads(layer)
        heads, slot_heads = len(matrix), self.summary_heads
        total = torch.zeros(heads, self.config.num_hidden_layers, slot_heads)
        by_entry = matrix.view(heads, len(reads), slot_heads).transpose(0, 1)  # [entries, heads, heads of an entry]
        for entry, weight in zip(reads, by_entry, strict=True):
            if entry.is_summary:
                summary = weights[f"{CHUNKS}{self.chunks[entry.layer].index}.weight"].float()
                total[:, entry.layers.start : entry.layers.stop] += self.summary_row(weight, summary, entry)
            else:
                total[:, entry.layer] += weight
        return total.abs().mean(-1)


def _runs(entries: Sequence[Entry], chunks: Sequence[Chunk]) -> list[list[Any]]:
    """Entries in their order as runs, [kind, first, end]; rows of summaries are counted over all chunks."""
    rows = [row for chunk in chunks for row in chunk.rows]
    runs: list[list[Any]] = []
    for entry in entries:
        kind, index = ("summaries", rows.index(entry)) if entry.is_summary else ("slots", entry.layer)
        if runs and runs[-1][0] == kind and runs[-1][2] == index:
            runs[-1][2] = index + 1
        else:
            runs.append([kind, index, index + 1])
    return runs
