"""Which entries of the layer history a layer reads, and the weights of chunk summaries.

The history covers new tokens only: for past tokens, the key/value cache holds the mixtures. An entry is dropped after the last
layer that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig

Entry = tuple[str, int]
"""("slots", layer) or ("summaries", row)."""


class Reads:
    """The entries that the layers read, from a configuration.

    Attributes:
        by_layer: for every layer, its entries in the order of the router's columns.
        chunks: by a chunk's last layer: index of the chunk, its slots, the rows of its summary.
        summarised: the slots of all chunks.
        summarised_or_read: the layers whose slots a later layer or a summary reads.
        dropped: for every layer, the entries that no later layer reads.
    """

    def __init__(self, config: LimeConfig) -> None:
        self.by_layer: list[list[Entry]] = [
            [(kind, index) for kind, begin, end in runs for index in range(begin, end)] for runs in config.reads
        ]
        self.chunks: dict[int, tuple[int, list[Entry], list[Entry]]] = {}
        first_row = 0
        for chunk, (begin, end, num_rows) in enumerate(config.chunks):
            sources: list[Entry] = [("slots", layer) for layer in range(begin, end)]
            rows: list[Entry] = [("summaries", row) for row in range(first_row, first_row + num_rows)]
            self.chunks[end - 1] = (chunk, sources, rows)
            first_row += num_rows
        self.summarised = {entry for _, sources, _ in self.chunks.values() for entry in sources}
        read = {entry for layer, entries in enumerate(self.by_layer) for entry in entries if entry != ("slots", layer)}
        self.summarised_or_read = {index for kind, index in self.summarised | read if kind == "slots"}
        last_reader: dict[Entry, int] = {}
        for layer, entries in enumerate(self.by_layer):
            own: list[Entry] = [("slots", layer)]
            sources = self.chunks[layer][1] if layer in self.chunks else []
            last_reader.update(dict.fromkeys([*own, *entries, *sources], layer))
        self.dropped: list[list[Entry]] = [[] for _ in self.by_layer]
        for entry, layer in last_reader.items():
            self.dropped[layer].append(entry)


class ChunkSummary(nn.Module):
    """Weights of the summary of a chunk of layers: signed (``routes: kv``), or logits of a softmax (``routes: hidden``)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(rows, columns))

    def forward(self) -> Tensor:
        return self.weight


class Summaries(nn.Module):
    """The weights of all chunk summaries.

    Args:
        heads: heads per slot; a summary has separate weights for every head.
    """

    def __init__(self, config: LimeConfig, heads: int) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(
            ChunkSummary(num_rows * heads, (end - begin) * heads) for begin, end, num_rows in config.chunks
        )

    def weight(self, chunk: int) -> Tensor:
        weight: Tensor = self.chunks[chunk]()
        return weight
