"""The single-process decoder as a pipeline in one process: its payloads are rounded at stage boundaries, as a wire rounds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.architecture import stage_layout
from lime_dist.model.cost import payload_parts
from lime_dist.model.crossing import ENTRIES, Cut, Prices
from lime_dist.model.decoder import Decoder, apply_head, embed, later_readers, layer_name, open_history, run_layers
from lime_dist.pipeline.payload import pack, unpack

Rounding = Callable[[Tensor], Tensor]
"""From a part of a payload [elements], or of its gradient, to what arrives of it."""
Roundings = Sequence[Rounding]
"""Of each part of a payload, in its order (`cost.PayloadParts`)."""


def as_bf16(part: Tensor) -> Tensor:
    return part.bfloat16().to(part.dtype)


def staged_logits(
    model: Decoder,
    tokens_BT: Tensor,
    bounds: Sequence[int],
    payload: Roundings,
    gradient: Roundings,
    prices: Prices = ENTRIES,
) -> Tensor:
    """Logits [B, T, V] of stages with layers bounds[s] … bounds[s+1]−1, or of the parts of a cut (``prices.cut``).

    Args:
        payload, gradient: what happens to payloads and to their gradients at a boundary.
        prices: of entries and partial mixtures, which say what crosses.
    """
    config = model.config
    embedding, *layers, norm, head = (model.get_submodule(spec.name) for spec in model.specs)
    position = {spec.name: index for index, spec in enumerate(model.specs[1:-2])}
    cuts = [*(position[layer_name(bound)] for bound in bounds[:-1]), len(layers)]
    hidden = embed(config, embedding, tokens_BT)
    received = hidden
    cut = prices.cut or Cut(tuple(bounds), len(bounds) - 1)
    layouts = [stage_layout(config, *cut.of_stage(stage), prices=prices) for stage in range(cut.stages)]
    histories = [open_history(config, layout, tokens_BT.numel(), hidden.dtype, hidden.device) for layout in layouts]
    for part, ((start, stop), (first, last)) in enumerate(zip(pairwise(bounds), pairwise(cuts), strict=True)):
        turn, stage = divmod(part, cut.stages)
        later = [model.get_submodule(spec.name) for spec in later_readers(config, layouts[stage])]
        if (history := histories[stage]) is not None and turn:
            history.begin_part(turn)
        if start:
            hidden = unpack(received, config.hidden_size, history)
        hidden, released = run_layers(layers[first:last], hidden, history, model.activation_checkpointing, later)
        if stop < bounds[-1]:
            sizes = [elements * tokens_BT.numel() for elements in payload_parts(config, stop, prices)]
            received = _Crossing.apply(pack(hidden, released, history), sizes, payload, gradient)
    return apply_head(config, norm, head, hidden)


class _Crossing(torch.autograd.Function):
    """Rounds the parts of a payload, and in backward those of its gradient."""

    @staticmethod
    def forward(ctx: Any, payload: Tensor, sizes: list[int], there: Roundings, back: Roundings) -> Tensor:
        ctx.sizes, ctx.back = sizes, back
        return _rounded(payload, sizes, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return _rounded(gradients[0], ctx.sizes, ctx.back), None, None, None


def _rounded(payload: Tensor, sizes: list[int], roundings: Roundings) -> Tensor:
    parts = payload.reshape(-1).split(sizes)
    rounded = [rounding(part) for rounding, part in zip(roundings, parts, strict=True)]
    return torch.cat(rounded).view(payload.shape)
