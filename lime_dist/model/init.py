"""All initial values, and which optimizer group a parameter belongs to: both are functions of its exported name.

A parameter's initial value depends on (seed, exported name, shape) alone, so every stage count starts from the same
model. Values are drawn in float32 on the CPU and then cast to the precision of the run.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig

Group = Literal["matrices", "plain", "routers"]
GROUPS: tuple[Group, ...] = ("matrices", "plain", "routers")
"""matrices: weight decay; plain (norms, embeddings): none; routers: none, and their own learning rate."""


def parameter_group(name: str) -> Group:
    """The optimizer group of an exported parameter name; the table is in CONTRIBUTING.md."""
    leaf = name.rpartition(".")[2]
    if ".router." in name or leaf in ("dynamic_alpha", "dynamic_beta"):
        return "routers"
    if name.endswith("norm.weight") or name == "model.embed_tokens.weight":
        return "plain"
    if leaf in ("static_alpha", "static_beta", "alpha_scale", "beta_scale"):
        return "plain"
    if name.endswith("_proj.weight") or name == "lm_head.weight":
        return "matrices"
    raise ValueError(f"the parameter {name} belongs to no optimizer group")


def initialise(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one parameter in place with its initial value (design, section 3)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(parameter.shape, dtype=torch.float32)
    if name.endswith("norm.weight"):
        value.fill_(1.0)
    elif name.endswith("self_attn.router.weight"):
        _initialise_router(value, config, generator)
    elif "_connection." in name:
        _initialise_connection(name, value)
    else:
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        value.normal_(0.0, std, generator=generator)
    with torch.no_grad():
        parameter.copy_(value)


def _initialise_router(value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """routes: hidden: w_ℓ ~ N(0, 0.1²), W_ℓ ~ N(0, 0.02²); routes: kv: see below."""
    if config.lime.routes == "kv":
        _initialise_key_value_router(value, config, generator)
    else:
        value.normal_(0.0, 0.02 if config.lime.router == "dynamic" else 0.1, generator=generator)


def _initialise_connection(name: str, value: Tensor) -> None:
    """Static α = [e_{k mod n} | I_n] in layer k and β = 1_n: a pre-norm decoder; the dynamic part starts at 0, scaled 0.01."""
    leaf = name.rpartition(".")[2]
    value.fill_({"static_beta": 1.0, "alpha_scale": 0.01, "beta_scale": 0.01}.get(leaf, 0.0))
    if leaf == "static_alpha":
        layer = int(name.split(".")[2])
        value[layer % len(value), 0] = 1.0
        value[:, 1:] = torch.eye(len(value))


def _initialise_key_value_router(value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """R_ℓ [G, (ℓ+1)G]: identity on the layer's own slot; elsewhere U(−b, b), b = √(3 / (entries read · G)), or 0."""
    heads, columns = value.shape
    if config.lime.router_init == "uniform":
        bound = math.sqrt(3 / columns)
        value.uniform_(-bound, bound, generator=generator)
    else:
        value.zero_()
    value[:, columns - heads :] = torch.eye(heads)


def build(
    module: nn.Module, names: dict[str, str], config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module that was made on the meta device its memory and initial values.

    Args:
        names: the exported name of each of the module's parameters, by its local name.
    """
    module.to_empty(device=device)
    module.to(dtype)
    for local, parameter in module.named_parameters():
        initialise(names[local], parameter, config, seed)
