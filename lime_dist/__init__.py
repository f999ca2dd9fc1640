"""lime_dist: a pipeline-parallel trainer for deep decoders with Layer-Integrated Memory (arXiv 2502.09245)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lime_dist.config.load import load_config
    from lime_dist.model.decoder import build_decoder

__version__ = "0.1.0"
__all__ = ["build_decoder", "load_config"]

_HOMES = {"load_config": "lime_dist.config.load", "build_decoder": "lime_dist.model.decoder"}


def __getattr__(name: str) -> Any:
    """Import on first use: the data tools need neither torch nor DeepSpeed, which take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
