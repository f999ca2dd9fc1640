"""Runs every kernel of a stage once before the first transfer.

The first launch of a kernel loads its code, and on a GPU that can wait for everything that the device does. A receive that has been
posted occupies the device until the peer sends, so a first launch would make a stage wait for its peer, or both for each other.
Compilation (``train.compile``) happens here too, on all stages at the same time instead of one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lime_dist.model.weight_gradients import deferring

if TYPE_CHECKING:
    from lime_dist.pipeline.engine import LimeEngine

LOSSES = 2
"""Losses that a warm-up adds up: the first of a step is copied, the others are added to it."""


def needs_warm_up(stages: int, device: torch.device, compiles: bool) -> bool:
    """Whether the stages of a pipeline have something to load or to compile before their first transfers."""
    return stages > 1 and (device.type != "cpu" or compiles)


def run_on_zeros(engine: LimeEngine, is_training: bool) -> None:
    """A forward pass of one micro-batch of zeros through this stage and, in training, the backward pass.

    Gradients change; the engine's losses do not.
    """
    shape = (engine.lime_config.train.micro_batch_size, engine.lime_config.data.sequence_length)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, device=engine.device)
    losses = engine.total_loss, engine.fwd_outputs
    engine.total_loss, engine.fwd_outputs = None, []
    engine.module.train(is_training)
    with torch.set_grad_enabled(is_training):
        inputs, history = (tokens_BT, None) if engine.is_first_stage() else engine.payload_of_zeros(*shape)
        if not engine.is_first_stage():
            inputs.requires_grad_(is_training)
        starts_BT = torch.zeros_like(tokens_BT) if engine.masks_documents else None
        gradients = engine.deferred_gradients() if is_training else None
        with deferring(gradients):
            output = engine.module(inputs, history, starts_BT)
        if engine.is_last_stage():
            for _ in range(LOSSES):
                loss = engine._add_loss(output, tokens_BT)
            if is_training:
                (loss / engine.micro_batches).backward()
        else:
            assert engine.module.wire_out is not None
            sent = engine.module.wire_out.encode(output.detach())
            if is_training:
                output.backward(engine.module.arrived_gradient(torch.zeros_like(sent), *shape))
        while gradients:
            gradients.compute_next(engine.optimizer.gradient_of)
        if inputs.grad is not None:
            assert engine.module.wire_in is not None
            engine.module.wire_in.encode(inputs.grad)
    engine.module.train()
    engine.total_loss, engine.fwd_outputs = losses
