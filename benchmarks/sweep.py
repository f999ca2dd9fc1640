"""Choose learning rates by one run of each, from a seed that the runs to compare do not have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from runs import Study

from lime_dist.errors import LimeError


def add_sweep_options(parser: argparse.ArgumentParser, lrs: Sequence[float]) -> None:
    """Add the options of a sweep over learning rates."""
    parser.add_argument("--lrs", nargs="+", type=float, default=lrs, help="learning rates to try")
    parser.add_argument(
        "--sweep-seed", type=int, default=0, help="seed of the runs that choose the learning rates (default 0)"
    )


def check_sweep_seed(arguments: argparse.Namespace) -> None:
    """
    Raises:
        LimeError: the runs to compare have the seed of the sweep.
    """
    if arguments.sweep_seed in arguments.seeds:
        raise LimeError(
            f"--sweep-seed {arguments.sweep_seed} is among --seeds; choose another, or the chosen setting is favoured"
        )


def sweep_losses(sweep: Study, variants: Sequence[str], seed: int) -> dict[str, float]:
    """Return the validation losses of a sweep by variant; infinity if a run diverged.

    Raises:
        LimeError: a run has not finished.
    """
    losses = {}
    for name in variants:
        loss = sweep.validation(name, seed)
        if loss is None:
            raise LimeError(f"{name} has not finished; run the same command again")
        losses[name] = math.inf if math.isnan(loss) else loss
    return losses
