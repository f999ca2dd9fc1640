"""What layers read of the layer history, from the configuration, and the weights of chunk summaries.

Only new tokens have a history. What a layer read for past tokens is already mixed in the key/value cache. An entry is dropped as
soon as no later layer reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig

Entry = tuple[str, int]
"""("slots", layer) or ("summaries", row)."""


class Reads:
    """What the layers read, from a configuration.

    Attributes:
        by_layer: entries in the order of the router's columns.
        chunks: by last layer: the chunk's number, its slots, its summary rows.
        summed_up: the slots of all chunks.
        dropped: by layer: entries that nobody reads after it.
    """

    def __init__(self, config: LimeConfig) -> None:
        self.by_layer: list[list[Entry]] = [
            [(kind, index) for kind, begin, end in runs for index in range(begin, end)] for runs in config.reads
        ]
        self.chunks: dict[int, tuple[int, list[Entry], list[Entry]]] = {}
        rows = 0
        for number, (begin, end, rank) in enumerate(config.chunks):
            sources: list[Entry] = [("slots", layer) for layer in range(begin, end)]
            summary: list[Entry] = [("summaries", row) for row in range(rows, rows + rank)]
            self.chunks[end - 1] = (number, sources, summary)
            rows += rank
        self.summed_up = {entry for _, sources, _ in self.chunks.values() for entry in sources}
        last: dict[Entry, int] = {}
        for layer, entries in enumerate(self.by_layer):
            own: list[Entry] = [("slots", layer)]
            last.update(
                dict.fromkeys([*own, *entries, *(self.chunks[layer][1] if layer in self.chunks else [])], layer)
            )
        self.dropped: list[list[Entry]] = [[] for _ in self.by_layer]
        for entry, layer in last.items():
            self.dropped[layer].append(entry)


class ChunkSummary(nn.Module):
    """How the slots of a chunk of layers are summed up: signed weights (kv), or the logits of a softmax (hidden)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(rows, columns))


class Summaries(nn.Module):
    """The weights of all chunk summaries.

    Args:
        heads: heads of a slot, to which a summary applies weights of their own.
    """

    def __init__(self, config: LimeConfig, heads: int) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(
            ChunkSummary(num_rows * heads, (end - begin) * heads) for begin, end, num_rows in config.chunks
        )

    def weight(self, chunk: int) -> Tensor:
        return self.chunks[chunk].get_parameter("weight")
