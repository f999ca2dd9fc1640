"""Bytes per element of the types of a run, and where its parameters may begin."""

from __future__ import annotations

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Of weights and activations, by ``precision``."""

FLOAT8_BLOCK = 128
"""Most elements that have a common scale in float8 (``pipeline.wire_dtype: fp8``). Smaller blocks are not more precise
(`benchmarks/wire_precision.py`)."""
SCALE_BYTES = 2
"""Of a block's scale, in bf16."""

ALIGNMENT = 128
"""Parameters begin at multiples of so many bytes of the flat weights: the unit of a GPU's memory traffic, and what fast matrix
products and collectives need of an address."""


def float8_bytes(elements: int, block: int) -> int:
    """Bytes of elements in float8, with the scales of their blocks."""
    return elements + elements // block * SCALE_BYTES


def accumulation_itemsize(itemsize: int) -> int:
    """Bytes per element of what is computed in at least float32, in a run whose precision has ``itemsize`` bytes."""
    return max(itemsize, 4)


def accumulation_bytes(precision: str) -> int:
    """Of accumulated gradients, master weights and optimizer states: these are held in at least float32."""
    return accumulation_itemsize(ITEM_BYTES[precision])


def aligned(elements: int, itemsize: int) -> int:
    """The least number of elements, at least ``elements``, after which the next parameter may begin.

    Args:
        itemsize: bytes per element of the weights.
    """
    unit = ALIGNMENT // itemsize
    return -(-elements // unit) * unit
