"""Worker cases on the fake GPU: what a rank of a job does to its device and its host. One process plays any rank."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
from support.exports import exported_in_memory, perturbed
from support.fake_gpu import DEVICE, NAME, FakeGpu, Wait, playing
from support.transfers import build
from torch import Tensor

from benchmarks.equality import rank_batches
from lime_dist.config.load import make_config

BEFORE_TRAINING = (
    "model/init.py",
    "distributed.py",
    "pipeline/module.py",
    "pipeline/placement.py",
    "pipeline/engine.py: __init__",
    "monitor/peak.py",
    "a test",
)
"""Places that wait before the first step."""


class Case(NamedTuple):
    """One rank of a job.

    Attributes:
        function: of this module.
        values: the configuration.
    """

    function: str
    values: dict[str, Any]
    rank: int
    size: int


def play(cases: list[Case]) -> list[Any]:
    """Results of the cases, where an error is its traceback."""
    results: list[Any] = []
    for case in cases:
        try:
            with playing(case.rank, case.size) as gpu:
                results.append(globals()[case.function](gpu, case.values))
        except Exception:
            results.append(traceback.format_exc(limit=-12))
        gc.collect()
    return results


def train(gpu: FakeGpu, values: dict[str, Any]) -> dict[str, Any]:
    """A training step, an evaluation, and a snapshot for a checkpoint."""
    config, engine, optimizer = build(values)
    replica, width, size = engine.grid.get_data_parallel_rank(), engine.dp_world_size, config.train.micro_batch_size
    if config.parallel.offload_history:  # the first step allocates pinned memory
        engine.train_step(_pinned(rank_batches(config, 0, replica, width, size)))
    gpu.reset()
    engine.train_step(_pinned(rank_batches(config, 0, replica, width, size)))
    result = {"stage": engine.stage_id, "step": list(gpu.waits), "after the last wait": gpu.queued, "moved": gpu.moved}
    gpu.reset()
    engine.evaluate(_pinned(rank_batches(config, 1, replica, width, size)), engine.micro_batches)
    result["evaluation"], result["after the evaluation"] = list(gpu.waits), gpu.queued
    tensors = [optimizer.flat_weights, optimizer.flat_gradients, *optimizer.masters, *optimizer.parameters.values()]
    tensors += [state for group in optimizer.parameter_groups for state in group.states.values()]
    result["devices"] = {tensor.device.type for tensor in tensors}
    copies = [copy for states in optimizer.saved_state().values() for copy in states.values()]
    result["snapshot"] = {tensor.device.type for tensor in copies}
    return result


def peak(gpu: FakeGpu, values: dict[str, Any]) -> tuple[int, int]:
    """The stage, and the most bytes that are alive in a training step."""
    config, engine, _ = build(values)
    replica, width, size = engine.grid.get_data_parallel_rank(), engine.dp_world_size, config.train.micro_batch_size
    gpu.reset()
    engine.train_step(_pinned(rank_batches(config, 0, replica, width, size)))
    return engine.stage_id, gpu.peak


def run(gpu: FakeGpu, values: dict[str, Any]) -> Counter[Wait]:
    """The waits of a whole run as pretrain.py does it."""
    import pretrain

    with redirect_stdout(StringIO()):
        pretrain.train(make_config(values, "a test"), verbose=False)
    return Counter(wait for wait in gpu.waits if not wait.where.startswith(BEFORE_TRAINING))


def _pinned(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """As the loader yields them for a GPU."""
    for tokens, labels in batches:
        yield tokens.pin_memory(), labels.pin_memory()


def export(gpu: FakeGpu, values: dict[str, Any]) -> set[str]:
    """Devices of the logits of an exported model: of a prompt, of a token after it with the cache, and of a padded batch."""
    model = make_config(values, "a test").model
    exported = exported_in_memory(model, perturbed(model)).to(DEVICE)
    tokens = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        prompt = exported(tokens, use_cache=True)
        mask = torch.ones(2, 6, dtype=torch.long, device=DEVICE)
        after = exported(tokens[:, :1], past_key_values=prompt.past_key_values, attention_mask=mask, use_cache=True)
        padded = exported(tokens, attention_mask=mask[:, 1:], use_cache=False)
    assert all(parameter.device.type == NAME for parameter in exported.parameters())
    return {output.logits.device.type for output in (prompt, after, padded)}
