"""The optimizer group of each parameter, by its exported name."""

from __future__ import annotations

from typing import Literal

from lime_dist.config.schema import ModelConfig

CHUNKS = "model.history.chunks."
Group = Literal["matrices", "plain", "routers"]
GROUPS: tuple[Group, ...] = ("matrices", "plain", "routers")
"""matrices: weight decay; plain (norms, embeddings): none; routers: none, and their own learning rate."""


def parameter_group(name: str) -> Group:
    """The optimizer group of an exported parameter name; the table is in CONTRIBUTING.md."""
    leaf = name.rpartition(".")[2]
    if ".router." in name or name.startswith(CHUNKS) or leaf in ("dynamic_alpha", "dynamic_beta"):
        return "routers"
    if name.endswith("norm.weight") or name == "model.embed_tokens.weight":
        return "plain"
    if leaf in ("static_alpha", "static_beta", "alpha_scale", "beta_scale"):
        return "plain"
    if name.endswith("_proj.weight") or name == "lm_head.weight":
        return "matrices"
    raise ValueError(f"the parameter {name} belongs to no optimizer group")


def optimizer_group(model: ModelConfig, name: str) -> Group:
    """The optimizer group of a parameter of a model."""
    return parameter_group(name)
