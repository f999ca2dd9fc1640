"""Layer-Integrated Memory (LIMe, arXiv 2502.09245): over keys and values (``routes: kv``) or hidden states (``routes: hidden``)."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.hidden.architecture import HiddenLime
from lime_dist.model.architectures.lime.kv.architecture import KeyValueLime
from lime_dist.model.architectures.lime.lime import Lime

ROUTES: dict[str, type[KeyValueLime] | type[HiddenLime]] = {"kv": KeyValueLime, "hidden": HiddenLime}


@ARCHITECTURES.register("lime")
def lime(config: ModelConfig) -> Lime:
    """The architecture that ``model.lime.routes`` names."""
    return ROUTES[config.lime.routes](config)
