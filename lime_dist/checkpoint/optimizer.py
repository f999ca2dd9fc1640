"""What a checkpoint reads from and writes to an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


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
        """Whether each replica holds the state of its own parameters only (ZeRO 1)."""

    def owned_names(self) -> list[str]:
        """Parameters whose state this rank saves. Over all ranks that save, each parameter is listed once."""

    def local_names(self) -> list[str]:
        """Parameters whose state this rank holds, including copies of tied weights that another stage saves."""

    def state(self, name: str) -> dict[str, Tensor]:
        """Writable views of a parameter's master weight and optimizer states, by state name."""

    def restore_finished(self, step_count: int) -> None:
        """Complete a restore: called after every `state` has been written.

        Args:
            step_count: number of updates that the restored state has seen.
        """
