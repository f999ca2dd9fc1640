"""Layer-Integrated Memory (LIMe, arXiv 2502.09245): over keys and values (``routes: kv``) or hidden states (``routes: hidden``);
and attention over earlier layers' keys and values instead of routers (``depth_attention: moda``)."""

from __future__ import annotations

from collections.abc import Callable

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.depth.architecture import DepthAttentionLime
from lime_dist.model.architectures.lime.hidden.architecture import HiddenLime
from lime_dist.model.architectures.lime.kv.architecture import KeyValueLime
from lime_dist.model.architectures.lime.lime import Lime

KINDS: dict[tuple[str, str], Callable[[ModelConfig], Lime]] = {
    ("kv", "none"): KeyValueLime,
    ("kv", "moda"): DepthAttentionLime,
    ("hidden", "none"): HiddenLime,
}
"""By routes and depth attention."""


@ARCHITECTURES.register("lime")
def lime(config: ModelConfig) -> Lime:
    """The architecture that ``model.lime.routes`` and ``model.lime.depth_attention`` name."""
    return KINDS[config.lime.routes, config.lime.depth_attention](config)
