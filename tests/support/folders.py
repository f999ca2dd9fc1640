"""The configuration of a small run, and readers of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lime_dist.monitor.metrics import without_clock


def values(dataset: Path, directory: Path, steps: int = 20, **parallel: Any) -> dict[str, Any]:
    return {
        "run": {"directory": str(directory)},
        "model": {
            "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "data": {"path": str(dataset), "sequence_length": 16},
        "train": {
            "steps": steps, "global_batch_size": 4, "micro_batch_size": 1, "evaluation_interval": 5,
            "evaluation_samples": 4, "checkpoint_interval": 10,
        },
        "optimizer": {"warmup_steps": 3},
        "parallel": parallel,
    }  # fmt: skip


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(directory: Path) -> list[dict[str, float]]:
    """Return the records without the fields that depend on the clock."""
    return [without_clock(record) for record in records(directory)]


def weights(directory: Path, step: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((directory / f"checkpoints/global_step{step}").glob("*.pt")):
        for name, entry in torch.load(path, weights_only=True).items():
            tensors.update({f"{name}/{key}": tensor for key, tensor in entry.items()})
    return tensors
