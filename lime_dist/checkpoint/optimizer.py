"""What a checkpoint reads from and writes to an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lime_dist.model.optimizer_states import StatePart


class CheckpointedOptimizer(Protocol):
    """The optimizer of one stage, as checkpoints see it: state by exported parameter name, independent of the layout."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """All parameters of the stage."""

    @property
    def step_count(self) -> int:
        """Number of updates applied so far."""

    @property
    def is_sharded(self) -> bool:
        """Whether replicas divide the state (ZeRO 1)."""

    def saved_state(self) -> dict[str, dict[str, Tensor]]:
        """A copy, in host memory, of the state that this rank saves: whole tensors by parameter and state. Over all ranks that save,
        each parameter is saved once. If the state is sharded, all replicas call it together."""

    def local_names(self) -> list[str]:
        """Parameters of which this rank holds state, including copies of tied weights that another stage saves."""

    def state(self, name: str) -> Sequence[StatePart]:
        """What this rank holds of a parameter's master weight and optimizer states; writable."""

    def restore_finished(self, step_count: int) -> None:
        """Complete a restore: called after every `state` has been written.

        Args:
            step_count: number of updates that the restored state has seen.
        """
