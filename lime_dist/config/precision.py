"""Bytes per element of the types of a run."""

from __future__ import annotations

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Of weights and activations, by ``precision``."""


def accumulation_bytes(precision: str) -> int:
    """Of accumulated gradients, master weights and optimizer states: these are held in at least float32."""
    return max(4, ITEM_BYTES[precision])
