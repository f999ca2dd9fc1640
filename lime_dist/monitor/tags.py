"""The names under which dashboards show the numbers of a record."""

from __future__ import annotations

import math
from collections.abc import Mapping

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/gradient_norm",
    "lr": "train/learning_rate",
    "router_lr": "train/router_learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "validation_loss": "validation/loss",
}
"""The tag of each key of a ``metrics.jsonl`` record that becomes a scalar."""
PERPLEXITY = {"loss": "train/perplexity", "validation_loss": "validation/perplexity"}
SET_PREFIX = "validation_loss/"
"""Before the name of a set of ``data.validation``: the key of its loss in a record."""
MAX_NATS = 80.0
"""A larger loss is drawn with the perplexity of this one, because its own overflows float32."""


def scalars(record: Mapping[str, float | int]) -> dict[str, float]:
    """What dashboards show of a record, by tag."""
    shown = {tag: record[key] for key, tag in TAGS.items() if key in record}
    perplexities = {tag: math.exp(min(record[key], MAX_NATS)) for key, tag in PERPLEXITY.items() if key in record}
    sets = {f"validation/{set_name(key)}/loss": record[key] for key in record if key.startswith(SET_PREFIX)}
    return {**shown, **perplexities, **sets}


def set_name(key: str) -> str:
    """The set of ``data.validation`` whose loss a key of a record is."""
    return key.removeprefix(SET_PREFIX)
