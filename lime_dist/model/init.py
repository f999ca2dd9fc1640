"""Initial values of parameters.

A parameter's initial value depends on (seed, exported name, shape) alone, so every stage count starts from the same
model. Values are drawn in float32 on the CPU and then cast to the precision of the run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of


def initialise(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one parameter in place with its initial value.

    Args:
        name: its exported name.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(parameter.shape, dtype=torch.float32)
    architecture_of(config).initialise(name, value, generator)
    with torch.no_grad():
        parameter.copy_(value)


def build(
    module: nn.Module, names: dict[str, str], config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module that was made on the meta device its memory and initial values.

    Args:
        names: exported name of each parameter of the module, by its local name.
    """
    module.to(dtype)
    module.to_empty(device=device)
    for local, parameter in module.named_parameters():
        initialise(names[local], parameter, config, seed)
