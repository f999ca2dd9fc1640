"""Which samples a step read: for messages, and to check that all stages of a pipeline that read data read the same."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from lime_dist.config.schema import Config
from lime_dist.data.order import Order, rank_positions
from lime_dist.data.ramp import BatchSizes
from lime_dist.train.stage_optimizer import NotFinite

MAX_NAMED = 16
"""Number of samples that a message lists; of the others it gives the number."""
MAX_PARAMETERS = 4
"""The same for parameters."""


def step_samples(config: Config, order: Order, consumed: int, replica: int, replicas: int) -> np.ndarray:
    """Samples, int64 [micro_batches, micro_batch_size], that a replica read in the step after ``consumed`` samples."""
    train = config.train
    size = BatchSizes(train.global_batch_size, train.batch_ramp).at(consumed)
    return order.samples_at(rank_positions(consumed, size, train.micro_batch_size, replica, replicas))


def name_samples(samples: np.ndarray) -> str:
    """The samples as text: ``samples 5, 1, 7``."""
    flat = samples.reshape(-1).tolist()
    more = f" and {len(flat) - MAX_NAMED:,} more" if len(flat) > MAX_NAMED else ""
    return f"sample{'s' * (len(flat) > 1)} {', '.join(map(str, flat[:MAX_NAMED]))}{more}"


def combine(checksums: Sequence[int]) -> int:
    """One CRC-32 from the checksums of a step's micro-batches."""
    return zlib.crc32(np.asarray(checksums, dtype=np.int64).tobytes())


def describe_not_finite(
    config: Config,
    order: Order,
    consumed: int,
    replica: int,
    replicas: int,
    losses: Sequence[float],
    parameters: NotFinite,
) -> str:
    """Name the micro-batches of the step after ``consumed`` samples whose loss is not finite; if all are finite, the parameters
    whose gradients or weights are not. All ranks must call it.

    Args:
        losses: of this rank's micro-batches, on the last stage; empty on the others.
        parameters: those that this rank owns.
    """
    own = [(replica, index, loss) for index, loss in enumerate(losses) if not np.isfinite(loss)]
    everyone: list[tuple[list[tuple[int, int, float]], NotFinite]] = [([], NotFinite())] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, parameters))
    gathered = [lost for lost, _ in everyone]
    parts = [
        f"micro-batch {index} of replica {replica} has loss {loss} "
        f"({name_samples(step_samples(config, order, consumed, replica, replicas)[index])})"
        for replica, index, loss in sorted(sum(gathered, []))
    ]
    if parts:
        return "; ".join(parts)
    everything = np.concatenate(
        [step_samples(config, order, consumed, index, replicas).ravel() for index in range(replicas)]
    )
    gradients = list(dict.fromkeys(name for _, lost in everyone for name in lost.gradients))
    weights = list(dict.fromkeys(name for _, lost in everyone for name in lost.weights))
    named = [
        f"the {kind} of {_name_parameters(names)}"
        for kind, names in (("weight", weights), ("gradient", gradients))
        if names
    ]
    what = " and ".join(named) or "the norm of all gradients together, though each gradient is finite,"
    return f"every loss is finite, but {what} is not ({name_samples(everything)})"


def _name_parameters(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_PARAMETERS} more parameters" if len(names) > MAX_PARAMETERS else ""
    return f"{', '.join(names[:MAX_PARAMETERS])}{more}"


def describe_difference(
    config: Config,
    order: Order,
    consumed: int,
    replicas: int,
    different: int,
    own: tuple[int, str, Sequence[int]] | None,
) -> str:
    """Name the sample for which two stages of replica ``different`` read different tokens; all ranks must call it.

    Args:
        own: (stage, data folder, checksum of each micro-batch) on the ranks of this replica that read data; None on all others.
    """
    own_with_host = None if own is None else (*own, socket.gethostname())
    gathered: list[tuple[int, str, Sequence[int], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own_with_host)
    first, *others = sorted(filter(None, gathered))
    last = next(other for other in reversed(others) if other[2] != first[2])
    samples = step_samples(config, order, consumed, different, replicas)
    index = next((i for i, (a, b) in enumerate(zip(first[2], last[2], strict=False)) if a != b), 0)
    sources = " and ".join(f"stage {stage} from {folder} on {host}" for stage, folder, _, host in (first, last))
    return f"{name_samples(samples[index])} (micro-batch {index}), {sources}"
