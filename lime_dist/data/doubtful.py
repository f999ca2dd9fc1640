"""Settings that are possible, but most likely not what was meant."""

from __future__ import annotations

from collections.abc import Iterator

from lime_dist.config.schema import Config
from lime_dist.data.ramp import BatchSizes


def doubtful_settings(config: Config) -> Iterator[str]:
    """A line for each of them: what it is, what it leads to, what to do."""
    train, optimizer, ramp = config.train, config.optimizer, config.train.batch_ramp
    if train.steps and optimizer.warmup_steps >= train.steps:
        reached = optimizer.lr * train.steps / optimizer.warmup_steps
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} is no less than train.steps={train.steps}: the learning rate rises "
            f"to {reached:.3g} and never falls; lower optimizer.warmup_steps"
        )
    if train.steps and ramp is not None:
        sizes = BatchSizes(train.global_batch_size, ramp)
        if (last := sizes.at(sizes.consumed_after(train.steps - 1))) < train.global_batch_size:
            yield (
                f"train.batch_ramp.samples={ramp.samples} is more than train.steps={train.steps} consume: the last batch has "
                f"{last} samples, not train.global_batch_size={train.global_batch_size}; lower train.batch_ramp.samples"
            )
