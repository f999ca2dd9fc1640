"""Runs every kernel of a stage once before the first transfer.

The first launch of a kernel loads its code, and on a GPU that can wait for everything that the device does. A receive that has been
posted occupies the device until the peer sends, so a first launch would make a stage wait for its peer, or both for each other.
Compilation (``train.compile``) happens here too, on all stages at the same time instead of one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lime_dist.model.weight_gradients import deferring

if TYPE_CHECKING:
    from lime_dist.model.history import LayerHistory
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
    passes: list[tuple[Tensor, Tensor]] = []  # by part, what its forward pass takes and gives
    kept: LayerHistory | None = None
    with torch.set_grad_enabled(is_training):
        starts_BT = torch.zeros_like(tokens_BT) if engine.masks_documents else None
        gradients = engine.deferred_gradients() if is_training else None
        for part, own in enumerate(engine.module.stage_parts):
            inputs, history = (tokens_BT, None) if own.embeds_tokens else engine.payload_of_zeros(*shape, part=part)
            if not own.embeds_tokens:
                inputs.requires_grad_(is_training)
            if part == 0 and len(engine.module.stage_parts) > 1:
                kept = history or engine.module.new_history(*shape)
            with deferring(gradients):
                passes.append((inputs, engine.module(inputs, kept or history, part, starts_BT)))
        for part, own in reversed(list(enumerate(engine.module.stage_parts))):
            inputs, output = passes.pop()
            if own.holds_head:
                for _ in range(LOSSES):
                    loss = engine._add_loss(output, tokens_BT)
                if is_training:
                    (loss / engine.micro_batches).backward()
            else:
                assert own.wire_out is not None
                sent = own.wire_out.encode(output.detach())
                if is_training:
                    output.backward(engine.module.arrived_gradient(torch.zeros_like(sent), *shape, part=part))
            if inputs.grad is not None:
                assert own.wire_in is not None
                own.wire_in.encode(inputs.grad)
        while gradients:
            gradients.compute_next(engine.optimizer.gradient_of)
    engine.module.train()
    engine.total_loss, engine.fwd_outputs = losses
