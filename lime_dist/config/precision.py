"""Bytes per element of the types of a run."""

from __future__ import annotations

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Of weights and activations, by ``precision``."""


def accumulation_itemsize(itemsize: int) -> int:
    """Bytes per element of what is computed in at least float32, in a run whose precision has ``itemsize`` bytes."""
    return max(itemsize, 4)


def accumulation_bytes(precision: str) -> int:
    """Of accumulated gradients, master weights and optimizer states: these are held in at least float32."""
    return accumulation_itemsize(ITEM_BYTES[precision])
