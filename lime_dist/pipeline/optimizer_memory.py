"""Bytes that the parameters of a stage take together with their gradients, master weights and optimizer states, and what replicas
exchange of them.

`lime_dist.train.stage_optimizer` allocates them, with the padding between parameters; which states there are is declared by the
optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lime_dist.config.precision import ITEM_BYTES, accumulation_bytes, aligned
from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.optimizer_states import optimizer_states, updated_whole
from lime_dist.model.parameters import Sizes
from lime_dist.model.transformer import EMBEDDING_WEIGHT
from lime_dist.pipeline.flat_layout import FlatLayout, lay_out
from lime_dist.pipeline.shared_weights import shared_parameters


@dataclass(frozen=True)
class Exchange:
    """What a replica of a stage exchanges with the others in a step.

    Attributes:
        calls: of collectives: one for each piece, and with ZeRO 1 one more.
        gradient_bytes: of the gradients that they sum.
        late_bytes: of those that they sum after all passes of a step: the first piece. The others can start within the last pass.
        weight_bytes: of the weights that they gather (ZeRO 1).
        sent: bytes that a replica sends if the collectives go around a ring.
    """

    calls: int
    gradient_bytes: int
    late_bytes: int
    weight_bytes: int
    sent: int


def parameter_bytes(config: Config, sizes: Sizes) -> int:
    """Bytes of parameters: weights, accumulated gradients, master weights if they are apart, and optimizer states.

    For ZeRO 0. With ZeRO 1 the replicas share the latter two.
    """
    everywhere = ITEM_BYTES[config.precision] + accumulation_bytes(config.precision)
    master, accumulation = _master_bytes(config), accumulation_bytes(config.precision)
    return sum(
        aligned(sizes[name], ITEM_BYTES[config.precision]) * (everywhere + master + len(states) * accumulation)
        for name, states in optimizer_states(config, sizes).items()
    )


def layout_of_stage(config: Config, sizes: Sizes, bounds: Sequence[int], replicas: int) -> FlatLayout:
    """The flat buffers of a stage.

    Args:
        sizes: number of elements of the stage's parameters.
        bounds: the result of `partition.stage_bounds`.
        replicas: number of replicas.
    """
    is_tied = config.model.tie_word_embeddings and config.parallel.pipeline_stages > 1
    return lay_out(
        {name: (size,) for name, size in sizes.items()},
        {name: architecture_of(config.model).parameter_group(name) for name in sizes},
        optimizer_states(config, sizes),
        ITEM_BYTES[config.precision],
        replicas if config.parallel.zero_stage == 1 else 1,
        tied={EMBEDDING_WEIGHT} if is_tied else frozenset(),
        shared=shared_parameters(config, bounds).keys(),
        whole=updated_whole(config, sizes),
    )


def optimizer_bytes(config: Config, layout: FlatLayout) -> tuple[int, int]:
    """Bytes of a stage's weights, and of all else that belongs to the optimizer: gradients, master weights, states.

    With ZeRO 1 the replicas share master weights and states; the replica that holds most counts.
    """
    accumulation = accumulation_bytes(config.precision)
    masters = layout.size // layout.owners * _master_bytes(config)
    held = masters + max(layout.state_elements()) * accumulation
    return layout.size * ITEM_BYTES[config.precision], layout.size * accumulation + held


def exchange_of(config: Config, layout: FlatLayout, replicas: int) -> Exchange:
    """What each of the replicas of a stage exchanges in a step, over NCCL."""
    if replicas == 1:
        return Exchange(0, 0, 0, 0, 0)
    pieces, size = len(layout.pieces), accumulation_bytes(config.precision)
    gradients, late = layout.size * size, len(layout.pieces[0]) * size
    if layout.owners == 1:
        return Exchange(pieces, gradients, late, 0, 2 * gradients * (replicas - 1) // replicas)
    weights = layout.size * ITEM_BYTES[config.precision]
    return Exchange(2 * pieces, gradients, late, weights, (gradients + weights) * (replicas - 1) // replicas)


def _master_bytes(config: Config) -> int:
    """Bytes of the master weight of an element; 0 if it is the weight itself."""
    accumulation = accumulation_bytes(config.precision)
    return accumulation if ITEM_BYTES[config.precision] < accumulation else 0
