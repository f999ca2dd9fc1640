"""In which form a payload and its gradient cross a stage boundary, and how many bytes they take. Imports no torch.

Every part of a payload is either sent in a floating-point type as it is, or quantised: its elements as float8 (e4m3), 1 byte each,
with one bf16 scale for every block of elements. `wire.py` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config.precision import ITEM_BYTES, float8_bytes
from lime_dist.config.schema import Config
from lime_dist.model.cost import payload_parts
from lime_dist.model.crossing import Prices
from lime_dist.pipeline.entry_format import block_of_entries, quantises_entries
from lime_dist.pipeline.shared_weights import boundary_prices


@dataclass(frozen=True)
class PartFormat:
    """One part of a payload on its way.

    Attributes:
        elements: per token.
        is_quantised: whether it is sent as float8.
    """

    elements: int
    is_quantised: bool


@dataclass(frozen=True)
class WireFormat:
    """How payloads over one boundary, and their gradients, travel.

    Attributes:
        dtype: type of the parts that are not quantised, as ``precision`` names it.
        parts: in the order in which they lie in the payload.
        block: elements of the quantised parts with a common scale; it divides each part's elements per token.
    """

    dtype: str
    parts: tuple[PartFormat, ...]
    block: int

    @classmethod
    def of(cls, config: Config, boundary: int, prices: Prices | None = None) -> WireFormat:
        """The format of what crosses the boundary before decoder layer ``boundary``.

        Args:
            prices: the result of `boundary_prices` with the cuts; None: without.
        """
        quantises = quantises_entries(config)
        dtype = config.precision if quantises else config.pipeline.wire_dtype or config.precision
        parts = payload_parts(config.model, boundary, boundary_prices(config) if prices is None else prices)
        return cls(
            dtype,
            (PartFormat(parts.hidden, False), PartFormat(parts.entries, quantises), PartFormat(parts.mixtures, False)),
            block_of_entries(config.model),
        )

    @property
    def quantised(self) -> int:
        """Elements per token that are sent as float8."""
        return sum(part.elements for part in self.parts if part.is_quantised)

    def nbytes(self, num_tokens: int) -> int:
        """Bytes of one payload on its way; its gradient has as many."""
        plain = sum(part.elements for part in self.parts) - self.quantised
        return num_tokens * (plain * ITEM_BYTES[self.dtype] + float8_bytes(self.quantised, self.block))
