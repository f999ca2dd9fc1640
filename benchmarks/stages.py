"""The stages of a decoder in one process, one after the other: what a pipeline computes, without its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lime_dist.model.architecture import stage_layout
from lime_dist.model.crossing import Prices
from lime_dist.model.decoder import Decoder, apply_head, embed, later_readers, open_history, run_layers
from lime_dist.model.layers import language_model_loss
from lime_dist.pipeline.payload import pack, unpack

Wire = Callable[[Tensor, int, bool], Tensor]
"""What arrives of a payload, or of its gradient (True), that is sent over the boundary before a layer."""


def run_stages(
    decoder: Decoder,
    bounds: Sequence[int],
    prices: Prices,
    tokens_BT: Tensor,
    labels_BT: Tensor,
    checkpointing: bool = False,
    wire: Wire = lambda payload, boundary, is_gradient: payload,
) -> Tensor:
    """Forward and backward; returns the loss. Gradients are accumulated in the decoder's parameters."""
    config, dtype = decoder.config, next(decoder.parameters()).dtype
    embedding, *_, norm, head = (decoder.get_submodule(spec.name) for spec in decoder.specs)
    received: list[Tensor] = []
    sent: list[Tensor] = []
    for start, stop in pairwise(bounds):
        layout = stage_layout(config, start, stop, prices)
        history = open_history(config, layout, tokens_BT.numel(), dtype, tokens_BT.device)
        if start:
            received.append(wire(sent[-1].detach(), start, False).clone().requires_grad_())
            hidden = unpack(received[-1], config.hidden_size, history)
        else:
            hidden = embed(config, embedding, tokens_BT)
        later = [decoder.get_submodule(spec.name) for spec in later_readers(config, layout)]
        hidden, released = run_layers(stage_modules(decoder, start, stop), hidden, history, checkpointing, later)
        if stop < config.num_hidden_layers:
            sent.append(pack(hidden, released, history))
    loss = language_model_loss(apply_head(config, norm, head, hidden), labels_BT)
    loss.backward()
    for boundary in reversed(bounds[1:-1]):
        gradient = received.pop().grad
        assert gradient is not None
        torch.autograd.backward([sent.pop()], [wire(gradient, boundary, True)])
    return loss.detach()


def stage_modules(decoder: Decoder, start: int, stop: int) -> list[nn.Module]:
    """The decoder layers of a stage, and the chunk summaries between them."""
    names = [spec.name for spec in decoder.specs]
    end = names.index(f"model.layers.{stop}") if stop < decoder.config.num_hidden_layers else len(names) - 2
    return [decoder.get_submodule(name) for name in names[names.index(f"model.layers.{start}") : end]]
