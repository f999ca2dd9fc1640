"""In which form a payload and its gradient cross a stage boundary, and how many bytes they take. Imports no torch.

Every part of a payload is either sent in a floating-point type as it is, or quantised: its elements as float8 (e4m3), 1 byte each,
with one bf16 scale for every block of elements. `wire.py` does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lime_dist.config.precision import ITEM_BYTES
from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.cost import payload_parts

FP8 = "fp8"
"""The value of ``pipeline.wire_dtype`` that quantises history entries."""
BLOCK = 128
"""Most elements with a common scale. Smaller blocks are not more precise (`benchmarks/wire_precision.py`)."""
SCALE_BYTES = 2


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
    def of(cls, config: Config, boundary: int) -> WireFormat:
        """The format of what crosses the boundary before decoder layer ``boundary``."""
        quantises = config.pipeline.wire_dtype == FP8
        dtype = config.precision if quantises else config.pipeline.wire_dtype or config.precision
        parts = payload_parts(config.model, boundary)
        return cls(
            dtype,
            (PartFormat(parts.hidden, False), PartFormat(parts.entries, quantises), PartFormat(parts.mixtures, False)),
            math.gcd(BLOCK, architecture_of(config.model).entry_width),
        )

    @property
    def quantised(self) -> int:
        """Elements per token that are sent as float8."""
        return sum(part.elements for part in self.parts if part.is_quantised)

    def nbytes(self, num_tokens: int) -> int:
        """Bytes of one payload on its way; its gradient has as many."""
        plain = sum(part.elements for part in self.parts) - self.quantised
        scales = self.quantised // self.block if self.quantised else 0
        return num_tokens * (plain * ITEM_BYTES[self.dtype] + self.quantised + scales * SCALE_BYTES)
