"""All initial values, and which optimizer group a parameter belongs to: both are functions of its exported name.

A parameter's initial value depends on (seed, exported name, shape) alone, so every stage count starts from the same
model. Values are drawn in float32 on the CPU and then cast to the precision of the run.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.groups import CHUNKS as CHUNKS
from lime_dist.model.groups import GROUPS as GROUPS
from lime_dist.model.groups import parameter_group as parameter_group
from lime_dist.model.policies import make_policy


def initialise(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one parameter in place with its initial value (design, section 3)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(parameter.shape, dtype=torch.float32)
    if name.endswith("norm.weight"):
        value.fill_(1.0)
    elif ".self_attn.router." in name:
        _initialise_router(name, value, config, generator)
    elif name.startswith(CHUNKS):
        _initialise_summary(value, config, generator)
    elif "_connection." in name:
        _initialise_connection(name, value)
    else:
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        value.normal_(0.0, std, generator=generator)
    with torch.no_grad():
        parameter.copy_(value)


def _initialise_router(name: str, value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """routes: hidden: w_ℓ ~ N(0, 0.1²), W_ℓ ~ N(0, 0.02²).

    routes: kv: R_ℓ is the identity on the layer's own slot; all else is U(−b, b), b = √(3 / (entries read · G)), or 0.
    """
    if config.lime.routes == "hidden":
        value.normal_(0.0, 0.02 if config.lime.router == "dynamic" else 0.1, generator=generator)
        return
    heads, columns = value.shape
    if config.lime.router_init == "uniform":
        read = len(make_policy(config.lime).reads(int(name.split(".")[2])))
        bound = math.sqrt(3 / (read * heads))
        value.uniform_(-bound, bound, generator=generator)
    else:
        value.zero_()
    if name.endswith("router.weight"):
        value[:, columns - heads :] = torch.eye(heads)


def _initialise_summary(value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """routes: kv: A_m = r orthonormal rows over the chunk's layers ⊗ I_G; hidden: logits N(0, 0.1²)."""
    if config.lime.routes == "hidden":
        value.normal_(0.0, 0.1, generator=generator)
        return
    heads = config.key_value_heads
    rank, size = value.shape[0] // heads, value.shape[1] // heads
    basis, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    value.copy_(torch.kron(basis.t(), torch.eye(heads, dtype=torch.float64)))


def _initialise_connection(name: str, value: Tensor) -> None:
    """Static α = [e_{k mod n} | I_n] in layer k and β = 1_n: a pre-norm decoder; the dynamic part starts at 0, scaled 0.01."""
    leaf = name.rpartition(".")[2]
    value.fill_({"static_beta": 1.0, "alpha_scale": 0.01, "beta_scale": 0.01}.get(leaf, 0.0))
    if leaf == "static_alpha":
        layer = int(name.split(".")[2])
        value[layer % len(value), 0] = 1.0
        value[:, 1:] = torch.eye(len(value))


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
