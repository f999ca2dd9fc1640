"""What worker processes run: training steps on random tokens through the real module, engine and optimizer."""

from __future__ import annotations

import gc
from collections import Counter
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


def rounds_partial_sums() -> bool:
    """Return whether bf16 products on GPUs may round partial sums to bf16."""
    return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


def compiled_operation() -> object:
    """Return the operation that DeepSpeed's backend compiled when the processes started, if any."""
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op
