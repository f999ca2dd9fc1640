"""What worker processes run: training steps on random tokens through the real module, engine and optimizer."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial
from typing import Any

import torch

from benchmarks.equality import loss_and_documents, train_stage
from lime_dist.config.load import make_config
from lime_dist.model.history import LayerHistory


def train_steps(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """Run steps on this rank; return losses, norms, this rank's gradients of the first step and parameters after the last.

    With ``evaluation_micro_batch_size``, each step is followed by an evaluation of one global batch in micro-batches of that size.
    """
    from lime_dist.distributed import quiet
    from lime_dist.train.build import build_engine

    config = make_config(values, "a test")
    if config.train.compile is True:
        torch._dynamo.reset()  # a process compiles a function only for a limited number of settings
    with quiet():
        engine, optimizer = build_engine(config, **loss_and_documents(config))
    result = train_stage(engine, optimizer, config, steps, evaluation_micro_batch_size)
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    result["leaked histories"] = sum(count for kind, count in kinds.items() if LayerHistory in kind.__mro__)
    result["routers"] = sum(".router." in name for name in optimizer.parameters)
    return result


def train_traced(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """`train_steps` with layers that are traced as for the compiler, but whose graphs torch's own operations run: quick to start."""
    from lime_dist.model import blocks

    compiled = blocks._compiled
    blocks._compiled = partial(compiled, backend="aot_eager")
    try:
        return train_steps(values, steps, evaluation_micro_batch_size)
    finally:
        blocks._compiled = compiled


PIECE_ELEMENTS = 300


def train_in_pieces(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """`train_steps` with pieces of at most 300 elements; also what this rank exchanged with its replicas in a step, what the plan
    predicts for NCCL, the number of pieces, and how many of them a step sums before all its gradients are final."""
    return _train_in_pieces(values, steps, evaluation_micro_batch_size, calls_of_nccl=False)


def train_with_calls_of_nccl(
    values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0
) -> dict[str, Any]:
    """The same with the collectives that are used on NCCL, which gloo has as well."""
    return _train_in_pieces(values, steps, evaluation_micro_batch_size, calls_of_nccl=True)


def _train_in_pieces(values: dict[str, Any], steps: int, evaluation: int, calls_of_nccl: bool) -> dict[str, Any]:
    from lime_dist.pipeline import flat_layout
    from lime_dist.pipeline.optimizer_memory import exchange_of, layout_of_stage
    from lime_dist.pipeline.partition import stage_bounds
    from lime_dist.train.early_sums import EarlySums
    from lime_dist.train.replicas import Replicas

    made: list[Replicas] = []
    early: list[EarlySums] = []
    whole, init, init_sums = flat_layout.PIECE_ELEMENTS, Replicas.__init__, EarlySums.__init__

    def noting(self: Replicas, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)
        if calls_of_nccl:
            self._by_slice, self._calls = False, 1

    def noting_sums(self: EarlySums, *arguments: Any) -> None:
        early.append(self)
        init_sums(self, *arguments)

    flat_layout.PIECE_ELEMENTS, Replicas.__init__ = PIECE_ELEMENTS, noting  # type: ignore[method-assign]  # replaced for this case only
    EarlySums.__init__ = noting_sums  # type: ignore[method-assign]  # likewise
    try:
        result = train_steps(values, steps, evaluation)
        config, (replicas,) = make_config(values, "a test"), made
        sizes = {name: tensor.numel() for name, tensor in result["parameters"].items()}
        layout = layout_of_stage(config, sizes, stage_bounds(config), replicas.count)
        result["planned"] = exchange_of(config, layout, replicas.count)
    finally:
        flat_layout.PIECE_ELEMENTS, Replicas.__init__ = whole, init  # type: ignore[method-assign]  # put back
        EarlySums.__init__ = init_sums  # type: ignore[method-assign]  # likewise
    stats = replicas.stats
    result["exchanged"] = (stats.calls / steps, stats.gradient_bytes / steps, stats.weight_bytes / steps)
    result["pieces"], result["early"] = len(layout.pieces), early[0].early / steps
    return result


def rounds_partial_sums() -> bool:
    """Return whether bf16 products on GPUs may round partial sums to bf16."""
    return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


def compiled_operation() -> object:
    """Return the operation that DeepSpeed's backend compiled when the processes started, if any."""
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op
