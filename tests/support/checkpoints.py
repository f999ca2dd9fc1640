"""Worker cases for checkpoints: save, find and load a small model, without training."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from lime_dist.config.load import make_config
from lime_dist.data.identity import DataIdentity
from lime_dist.errors import LimeError

NUM_SAMPLES = 100


def settings(stages: int = 2, **sections: Any) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
        },
        "data": {"sequence_length": 4},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
        "parallel": {"pipeline_stages": stages},
        **sections,
    }  # fmt: skip


def _build(values: dict[str, Any], directory: str) -> tuple[Any, Any, Any]:
    from lime_dist.checkpoint.saver import Saver
    from lime_dist.distributed import quiet
    from lime_dist.train.build import build_engine

    config = make_config(values, "a test")
    with quiet():
        engine, optimizer = build_engine(config)
    replica = engine.grid.get_data_parallel_rank()
    return (
        config,
        optimizer,
        Saver(Path(directory), config, DataIdentity(NUM_SAMPLES), optimizer, engine.stage_id, replica),
    )


def save_beside_immutable(values: dict[str, Any], directory: str, steps: list[int]) -> list[str]:
    """`save`, where nothing of the name ``immutable`` can be deleted or renamed."""
    from unittest import mock

    def refusing(action: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(path).name == "immutable":
                raise PermissionError(errno.EPERM, "Operation not permitted", path)
            return action(path, *arguments, **options)

        return call

    with mock.patch("os.unlink", refusing(os.unlink)), mock.patch("os.rename", refusing(os.rename)):
        return save(values, directory, steps)


def _fill(optimizer: Any, step: int) -> None:
    """Set weights and moments to a function of name and step."""
    with torch.no_grad():
        for name in optimizer.local_names():
            for part in optimizer.state(name):
                for index, tensor in enumerate(part.values.values()):
                    tensor.copy_(
                        part.elements.start + torch.arange(len(tensor)) + sum(map(ord, name)) + 1000 * index + step
                    )
    optimizer.restore_finished(step)


def _states(optimizer: Any) -> list[torch.Tensor]:
    """All states that this rank holds, in an order of their own."""
    names = optimizer.local_names()
    return [tensor for name in names for part in optimizer.state(name) for tensor in part.values.values()]


def save(values: dict[str, Any], directory: str, steps: list[int]) -> list[str]:
    """Save these steps in turn; return an error line for each, empty if it was saved."""
    from lime_dist.data.state import TrainState

    _, optimizer, saver = _build(values, directory)
    lines = []
    for step in steps:
        _fill(optimizer, step)
        try:
            lines.append("".join(saver.save(TrainState(step, 4 * step)).problems))
        except LimeError as error:
            lines.append(str(error))
    return lines


def find(directory: str) -> tuple[int | None, list[str]]:
    """Return the step of the checkpoint from which a run would resume, and the lines about those passed over."""
    from lime_dist.checkpoint import store

    newest, lines = store.find_newest(Path(directory))
    return (None if newest is None else newest.state.step), lines


def load(values: dict[str, Any], directory: str) -> int:
    """Load the newest checkpoint into a new model, check that every value is of its step, and return the step; 0 if there is none."""
    from lime_dist.checkpoint import store

    config, optimizer, _ = _build(values, directory)
    newest, _ = store.find_newest(Path(directory))
    if newest is None:
        return 0
    store.load(newest, config, DataIdentity(NUM_SAMPLES), optimizer)
    got = [tensor.clone() for tensor in _states(optimizer)]
    _fill(optimizer, newest.state.step)
    assert all(map(torch.equal, got, _states(optimizer)))
    assert optimizer.step_count == newest.state.step and newest.state.consumed_samples == 4 * newest.state.step
    return newest.state.step


def start_from(values: dict[str, Any]) -> tuple[str, int, int, dict[str, float]]:
    """Start a model from ``run.start_from``, twice, as after a spike.

    Returns:
        The error line; else empty, with the step at which the run begins, the number of updates, and the values of one weight and
        of its optimizer states by their names.
    """
    from lime_dist.checkpoint.restore import restore_newest

    config, optimizer, _ = _build(values, values["run"]["directory"])
    for _ in range(2):
        _fill(optimizer, 7)
        try:
            checkpoint, _ = restore_newest(
                Path(config.run.directory), config, DataIdentity(NUM_SAMPLES), optimizer, lambda line: None
            )
        except LimeError as error:
            return str(error), 0, 0, {}
    assert checkpoint is not None
    state = optimizer.state(optimizer.local_names()[0])[0].values
    return "", checkpoint.state.step, optimizer.step_count, {key: tensor.mean().item() for key, tensor in state.items()}
