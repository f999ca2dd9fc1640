"""Bytes that the parameters of a stage take together with their gradients, master weights and optimizer states.

`lime_dist.train.stage_optimizer` allocates them, with the padding between parameters; which states there are is declared by the
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from lime_dist.config.precision import ITEM_BYTES, accumulation_bytes, aligned
from lime_dist.config.schema import Config
from lime_dist.model.optimizer_states import optimizer_states
from lime_dist.model.parameters import Sizes
from lime_dist.pipeline.owners import assign_owners


def parameter_bytes(config: Config, sizes: Sizes) -> int:
    """Bytes of parameters: weights, accumulated gradients, master weights if they are apart, and optimizer states.

    For ZeRO 0. With ZeRO 1 the replicas share the latter two.
    """
    everywhere = ITEM_BYTES[config.precision] + accumulation_bytes(config.precision)
    padded = _padded(config, sizes)
    return sum(padded[name] * (everywhere + shared) for name, shared in _shared_bytes(config, sizes).items())


def optimizer_bytes(config: Config, sizes: Sizes, tied: Set[str], replicas: int) -> tuple[int, int]:
    """Bytes of a stage's weights, and of all else that belongs to the optimizer: gradients, master weights, states.

    With ZeRO 1 the replicas share master weights and states, whole parameters each; the replica that holds most counts.

    Args:
        sizes: number of elements of the stage's parameters.
        tied: parameters that another stage holds as well.
    """
    padded, shared = _padded(config, sizes), _shared_bytes(config, sizes)
    total = sum(padded.values())
    owners = replicas if config.parallel.zero_stage == 1 else 1
    held = [0] * owners
    for name, owner in assign_owners(sizes, owners, tied).items():
        held[owner] += padded[name] * shared[name]
    return total * ITEM_BYTES[config.precision], total * accumulation_bytes(config.precision) + max(held)


def _padded(config: Config, sizes: Sizes) -> Sizes:
    """Elements from the beginning of each parameter to that of the next."""
    return {name: aligned(size, ITEM_BYTES[config.precision]) for name, size in sizes.items()}


def _shared_bytes(config: Config, names: Iterable[str]) -> dict[str, int]:
    """Bytes per element of what replicas share with ZeRO 1: the master weight, if it is apart, and optimizer states."""
    accumulation = accumulation_bytes(config.precision)
    master = accumulation if ITEM_BYTES[config.precision] < accumulation else 0
    return {name: master + len(states) * accumulation for name, states in optimizer_states(config, names).items()}
