"""What worker processes run: training steps on random tokens through the real module, engine and optimizer."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lime_dist.config.load import make_config
from lime_dist.config.schema import Config
from lime_dist.data.answers import Answers
from lime_dist.data.order import rank_positions
from lime_dist.model.history import LayerHistory

Batch = tuple[Tensor, Tensor]
EOS = 2
SHARES = {"training": 0.2, "validation": 0.25}
"""Assumed shares of counted tokens, which divide the loss of runs that count answers only. Any constants will do."""


def random_batch(config: Config, step: int) -> Batch:
    """Return the global batch of a step: (tokens, labels) [global batch, T]."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = (config.train.global_batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, size, generator=generator)
    if config.data.answer_token is not None:
        labels = Answers(config.data.answer_token, EOS).labels(tokens.numpy())
        return tokens[:, :-1].contiguous(), torch.from_numpy(labels)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def rank_batches(config: Config, step: int, replica: int, width: int, micro_batch_size: int) -> Iterator[Batch]:
    """Yield one replica's micro-batches of a step."""
    tokens, labels = random_batch(config, step)
    for rows in rank_positions(0, config.train.global_batch_size, micro_batch_size, replica, width):
        yield tokens[rows], labels[rows]


def perturb(name: str, parameter: Tensor) -> None:
    """Add noise that depends only on the parameter's name, so that norms are not 1 and no symmetry hides an error."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def train_steps(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """Run steps on this rank; return losses, norms, this rank's gradients of the first step and parameters after the last.

    With ``evaluation_micro_batch_size``, each step is followed by an evaluation of one global batch in micro-batches of that size.
    """
    from lime_dist.data.answers import CountedShares
    from lime_dist.distributed import quiet
    from lime_dist.train.build import build_engine

    config = make_config(values, "a test")
    if config.train.compile:
        torch._dynamo.reset()  # a process compiles a function only for a limited number of settings
    with quiet():
        shares = CountedShares(**SHARES) if config.data.answer_token is not None else CountedShares()
        engine, optimizer = build_engine(config, counted_shares=shares)
    with torch.no_grad():
        for name, parameter in optimizer.parameters.items():
            perturb(name, parameter)
        for name in optimizer.local_names():
            optimizer.state(name)["weight"].copy_(optimizer.parameters[name])
    replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    result: dict[str, Any] = {
        "stage": engine.stage_id,
        "replica": replica,
        "losses": [],
        "norms": [],
        "evaluations": [],
    }
    result["rates"] = []
    before = {name: optimizer.state(name)["weight"].clone() for name in optimizer.local_names()}
    update = optimizer.step

    def recorded_update() -> bool:
        if "gradients" not in result:
            result["gradients"] = {name: optimizer.gradient(name).clone() for name in optimizer.local_names()}
        return update()

    optimizer.step = recorded_update
    for step in range(steps):
        result["rates"].append(optimizer.learning_rates())
        result["losses"].append(
            engine.train_step(rank_batches(config, step, replica, width, config.train.micro_batch_size))
        )
        result["norms"].append(optimizer.gradient_norm)
        if size := evaluation_micro_batch_size:
            batches = rank_batches(config, 100, replica, width, size)
            parts = config.train.global_batch_size // size // width
            result["evaluations"].append(engine.evaluate(batches, parts, size))
    result["parameters"] = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    result["updates"] = {name: optimizer.state(name)["weight"] - weight for name, weight in before.items()}
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    result["leaked histories"] = sum(count for kind, count in kinds.items() if LayerHistory in kind.__mro__)
    result["routers"] = sum(".router." in name for name in optimizer.parameters)
    return result


def rounds_partial_sums() -> bool:
    """Return whether bf16 products on GPUs may round partial sums to bf16."""
    return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


def compiled_operation() -> object:
    """Return the operation that DeepSpeed's backend compiled when the processes started, if any."""
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op
