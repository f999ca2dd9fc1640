"""What `pretrain.py` would refuse on this host before its first step, by the same code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lime_dist.checkpoint.source import why_not_startable
from lime_dist.checkpoint.store import saved_steps, why_not_resumable
from lime_dist.config.deepspeed import batch_split
from lime_dist.config.schema import Config
from lime_dist.data.run_data import describe_evaluation, read_run_data
from lime_dist.errors import LimeError
from lime_dist.export.run_tokenizer import encode_prompts


def preflight(config: Config, processes: int) -> tuple[list[str], list[str], list[str]]:
    """Open the data, read their first samples, and compare the run folder with the configuration.

    Args:
        processes: of the whole job.

    Returns:
        What pretrain.py would refuse, what is most likely not meant, and what it would remark, one line each.
    """
    refusals = [line for line in [why_not_writable(Path(config.run.directory))] if line is not None]
    warnings, notes = list[str](), list[str]()
    try:
        replicas, _ = batch_split(config, processes)
    except LimeError:  # reported with the size of the job
        return refusals, warnings, notes
    try:
        data = read_run_data(config, replicas)
        note = describe_evaluation(config, data.evaluation_samples, replicas)
        if note is not None:
            (notes if data.evaluation_samples or config.data.validation else warnings).append(note)
        batches = data.train_batches(replica=0, consumed_samples=0)
        try:
            next(batches)
        finally:
            batches.close()
        if (validation := data.validation_batches(replica=0)) is not None:
            next(iter(validation))
        for each in data.validation_sets:
            next(iter(each.batches(config, 0, replicas)))
        if config.monitor.samples is not None:
            encode_prompts(config, config.monitor.samples)
        checkpoints = Path(config.run.directory) / "checkpoints"
        why_not = why_not_resumable(checkpoints, config, data.identity)
        if not saved_steps(checkpoints):
            why_not = why_not_startable(config, data.identity)
        refusals += [] if why_not is None else [why_not]
    except LimeError as error:
        refusals.append(str(error))
    return refusals, warnings, notes


def why_not_writable(directory: Path) -> str | None:
    """Why the run folder can neither be made nor written, or None."""
    existing = directory.absolute()
    while not os.path.exists(existing):  # False also below a folder that this user may not search
        existing = existing.parent
    if not existing.is_dir():
        reason = os.strerror(errno.ENOTDIR)
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES)
    else:
        return None
    return f"run.directory={directory}: {reason}; give a folder that can be written"
