"""Worker cases that run the trainer as pretrain.py does, from configuration to closing lines."""

from __future__ import annotations

from typing import Any

import pretrain
from lime_dist.config.load import make_config
from lime_dist.errors import LimeError


def run(values: dict[str, Any]) -> str:
    """Train; returns the error line of a user's mistake, empty on success."""
    try:
        pretrain.train(make_config(values, "a test"), verbose=False)
    except LimeError as error:
        return str(error)
    return ""
