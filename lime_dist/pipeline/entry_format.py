"""Whether entries of the layer history cross stage boundaries as float8, and what an entry costs then. Imports no torch."""

from __future__ import annotations

import math

from lime_dist.config.precision import FLOAT8_BLOCK, ITEM_BYTES, float8_bytes
from lime_dist.config.schema import Config, ModelConfig
from lime_dist.model.architecture import architecture_of
from lime_dist.model.crossing import Prices


def quantises_entries(config: Config) -> bool:
    """Whether entries and their gradients are sent as float8."""
    return config.pipeline.wire_dtype == "fp8"


def block_of_entries(model: ModelConfig) -> int:
    """Elements of entries with a common scale."""
    return math.gcd(FLOAT8_BLOCK, architecture_of(model).entry_width)


def prices_by_bytes(config: Config) -> Prices:
    """What it costs to send an entry and a partial mixture, relative to each other."""
    if not quantises_entries(config):
        return Prices(entry=1, mixture=1)
    block = block_of_entries(config.model)
    return Prices(entry=float8_bytes(block, block), mixture=block * ITEM_BYTES[config.precision])
