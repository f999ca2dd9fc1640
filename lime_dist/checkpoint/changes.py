"""What a resumed run does differently than the one that wrote its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from lime_dist.checkpoint.store import Checkpoint
from lime_dist.config.flat import changed_keys
from lime_dist.config.registry import LEARNING_RATES
from lime_dist.config.schema import Config
from lime_dist.data.ramp import BatchSizes

JUMP = 0.01
"""A learning rate that differs by a larger fraction has jumped."""

CONSEQUENCES = {
    "train.seed": "the weights come from the checkpoint, so train.seed has no effect",
    "precision": "from now on weights and activations are of another type; master weights and moments continue",
    "data.document_mask": "from now on attention, positions and the loss treat documents differently",
    "train.micro_batch_size": "the same samples are summed in another order",
    "optimizer.betas": "the moments of the checkpoint were averaged with other betas",
}
"""What a change of a key means, where that is not plain."""


def describe_changes(checkpoint: Checkpoint, config: Config) -> Iterator[str]:
    """Lines about every setting that has changed since a checkpoint, and warnings of what jumps because of it.

    Args:
        config: the configuration of the run that resumes from it.
    """
    saved = Config.model_validate(checkpoint.manifest["config"])
    changes = changed_keys(saved, config)
    if saved.train.evaluation_samples is None:  # left open there, settled here
        changes.pop("train.evaluation_samples", None)
    if not changes:
        return
    step, consumed = checkpoint.state.step, checkpoint.state.consumed_samples
    yield f"settings changed since step {step}:"
    for key, (old, new) in changes.items():
        yield f"  {key}: {old} → {new}"
    for name, old_lr, new_lr in _learning_rates(saved, config, checkpoint.optimizer_steps):
        if abs(new_lr - old_lr) > JUMP * old_lr:
            yield f"warning: the {name} of step {step + 1} is {new_lr:.3g}; with the earlier settings it was {old_lr:.3g}"
    old_size, new_size = (
        BatchSizes(each.train.global_batch_size, each.train.batch_ramp).at(consumed) for each in (saved, config)
    )
    if old_size != new_size:
        yield f"warning: the batch of step {step + 1} has {new_size} samples; with the earlier settings it had {old_size}"
    for key, consequence in CONSEQUENCES.items():
        if key in changes:
            yield f"warning: {key} changed from {changes[key][0]} to {changes[key][1]}: {consequence}"


def _learning_rates(saved: Config, config: Config, updates: int) -> Iterator[tuple[str, float, float]]:
    """Name, old and new value of each learning rate of the update after ``updates`` earlier ones."""
    factors = [
        LEARNING_RATES[each.optimizer.schedule](each.optimizer, each.train.steps).factor(updates)
        for each in (saved, config)
    ]
    for name, old, new in (
        ("learning rate", saved.optimizer.lr, config.optimizer.lr),
        ("learning rate of the routers", saved.optimizer.router_lr, config.optimizer.router_lr),
    ):
        yield name, old * factors[0], new * factors[1]
