"""Restores a run from its newest whole checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.checkpoint.store import Checkpoint, find_newest, load
from lime_dist.config.schema import Config


def restore_newest(
    directory: Path,
    config: Config,
    num_samples: int,
    optimizer: CheckpointedOptimizer,
    say: Callable[[str], None],
) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest whole checkpoint into the optimizer and the weights; all ranks must call it.

    Args:
        directory: the run's folder of checkpoints.
        num_samples: size of the training split.
        say: prints a line for each checkpoint that is passed over, before anything is loaded.

    Returns:
        The checkpoint that was loaded, None if there is no whole one; and these lines.

    Raises:
        LimeError: the checkpoint belongs to another model or to other data; nothing has been loaded.
    """
    checkpoint, passed_over = find_newest(directory)
    for line in passed_over:
        say(line)
    if checkpoint is not None:
        load(checkpoint, config, num_samples, optimizer)
    return checkpoint, passed_over
