"""The states that the configured optimizer keeps of each parameter: checkpoints store them, plans count their bytes."""

from __future__ import annotations

from collections.abc import Iterable

from lime_dist.config.registry import OPTIMIZERS
from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of

WEIGHT = "weight"
"""Name of a parameter's master weight among its states in a checkpoint."""

States = dict[str, tuple[str, ...]]
"""Names of the optimizer states of each parameter, by exported name. Each state is a tensor of the parameter's shape, in the
type of the master weights (at least float32)."""


def optimizer_states(config: Config, names: Iterable[str]) -> States:
    """The states that the optimizer of a run keeps of the parameters ``names``, as the optimizer declares them."""
    optimizer = OPTIMIZERS[config.optimizer.name](config.optimizer)
    return {name: optimizer.states(name, architecture_of(config.model).parameter_group(name)) for name in names}
