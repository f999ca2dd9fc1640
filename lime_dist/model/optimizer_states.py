"""The states that the configured optimizer keeps of each parameter: checkpoints store them, plans count their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lime_dist.config.registry import OPTIMIZERS
from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = "weight"
"""Name of a parameter's master weight among its states in a checkpoint."""

States = dict[str, tuple[str, ...]]
"""Names of the optimizer states of each parameter, by exported name. Each state is a tensor of the parameter's shape, in the
type of the master weights (at least float32)."""


@dataclass(frozen=True)
class StatePart:
    """The state of consecutive elements of a parameter.

    Attributes:
        elements: of the flattened parameter.
        values: the master weight (``weight``) and the optimizer states of these elements, by name; flat and writable.
    """

    elements: range
    values: Mapping[str, Tensor]


def optimizer_states(config: Config, names: Iterable[str]) -> States:
    """The states that the optimizer of a run keeps of the parameters ``names``, as the optimizer declares them."""
    optimizer = OPTIMIZERS[config.optimizer.name](config.optimizer)
    return {name: optimizer.states(name, architecture_of(config.model).parameter_group(name)) for name in names}


def updated_whole(config: Config, names: Iterable[str]) -> frozenset[str]:
    """Those of the parameters ``names`` whose update needs them whole, as the optimizer of a run declares it."""
    optimizer, group_of = (
        OPTIMIZERS[config.optimizer.name](config.optimizer),
        architecture_of(config.model).parameter_group,
    )
    return frozenset(name for name in names if not optimizer.is_elementwise(name, group_of(name)))
