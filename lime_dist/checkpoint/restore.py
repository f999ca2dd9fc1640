"""Restores a run from its newest whole checkpoint, or starts it from one of another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lime_dist.checkpoint.optimizer import CheckpointedOptimizer
from lime_dist.checkpoint.source import find_source
from lime_dist.checkpoint.store import Checkpoint, find_newest, load
from lime_dist.config.schema import Config
from lime_dist.data.identity import DataIdentity


def restore_newest(
    directory: Path,
    config: Config,
    data: DataIdentity,
    optimizer: CheckpointedOptimizer,
    say: Callable[[str], None],
) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest whole checkpoint, else that of ``run.start_from``, into optimizer and weights; all ranks must call it.

    Args:
        directory: the run's folder of checkpoints.
        data: the training data.
        say: prints a line for each checkpoint that is passed over, before anything is loaded; and what a change of the data
            means for their order.

    Returns:
        The checkpoint that was loaded, None if there is no whole one; and the lines about those that were passed over.

    Raises:
        LimeError: the checkpoint belongs to another model or to other data; nothing has been loaded.
    """
    checkpoint, passed_over = find_newest(directory)
    for line in passed_over:
        say(line)
    if checkpoint is None and not passed_over:
        checkpoint = find_source(config.run)
    if checkpoint is not None:
        for line in load(checkpoint, config, data, optimizer):
            say(line)
    return checkpoint, passed_over
