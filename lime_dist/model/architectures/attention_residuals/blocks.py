"""Which outputs a sub-layer reads: blocks of consecutive sub-layers, and groups of sub-layers whose reads are one product.

Layer ℓ has the sub-layers 2ℓ (attention) and 2ℓ+1 (SwiGLU); 2L is the last read, before the final norm. Block 0 is the embedding
alone, and block n ≥ 1 the sum of the outputs of the sub-layers (n−1)·size … n·size−1. A block is finished, and becomes an entry of
the layer history, when the next one begins.

Imports no torch: plans are made without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lime_dist.model.policies import Entry

GROUP = 8
"""Most sub-layers whose reads of older blocks are one product; their mixtures are in memory together."""


@dataclass(frozen=True)
class Blocks:
    """The history policy. A layer leaves zero, one or two slots: one for each of its sub-layers with which a block begins.

    Attributes:
        size: sub-layers of a block.
    """

    size: int

    def reads(self, layer: int) -> Sequence[Entry]:
        begins = range(0, 2 * layer + 2, self.size)
        return tuple(Entry(sublayer // 2, row=sublayer % 2) for sublayer in begins)

    def begins(self, sublayer: int) -> bool:
        """Whether a block begins with a sub-layer."""
        return sublayer % self.size == 0

    def finished(self, sublayer: int) -> int:
        """Number of finished blocks, the embedding included, when a sub-layer reads."""
        return sublayer // self.size + 1

    def finished_at_end(self, num_layers: int) -> int:
        """Number of finished blocks when the last read takes place, which also reads the sum of the last block."""
        return self.finished(2 * num_layers - 1)

    def name(self, block: int, num_layers: int) -> str:
        """A block in words. It may not be finished when it is read."""
        if block == 0:
            return "embedding"
        first, last = (block - 1) * self.size, min(block * self.size, 2 * num_layers) - 1
        begin, end = (f"{('attention', 'MLP')[sublayer % 2]} of layer {sublayer // 2}" for sublayer in (first, last))
        return begin if first == last else f"{begin} to {end}"

    def group(self, sublayer: int) -> range:
        """The sub-layers that share a product with this one: several whole blocks, or a part of one."""
        if self.size <= GROUP:
            size = self.size * (GROUP // self.size)
            begin = sublayer - sublayer % size
            return range(begin, begin + size)
        block = sublayer - sublayer % self.size
        begin = sublayer - (sublayer - block) % GROUP
        return range(begin, min(begin + GROUP, block + self.size))
