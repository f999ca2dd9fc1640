"""Activations that a backward pass computes again instead of keeping them (``parallel.activation_checkpointing``).

With ``true`` only the input of a decoder layer is kept, with ``selective`` the layer's feed-forward half is what backward computes again:
the MLP with its norm, which keep more than half of a layer's activations and cost less to repeat than attention and its projections.
Nothing here is random, so that no state of a generator is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lime_dist.config.schema import Checkpointing
from lime_dist.model.history import LayerHistory
from lime_dist.model.layers import Positions
from lime_dist.model.weight_gradients import WeightGradients, deferring

_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class _Halves:
    """The feed-forward halves of the layer that runs now.

    Attributes:
        recomputed: whether backward computes them again.
    """

    recomputed: ClassVar[bool] = False


def run_layer(
    layer: Callable[..., Tensor],
    hidden: Tensor,
    history: LayerHistory | None,
    positions: Positions,
    setting: Checkpointing,
) -> Tensor:
    """The output of a decoder layer, [B, T, *hidden_shape], of which autograd keeps what ``setting`` says."""
    if setting is True and torch.is_grad_enabled():
        contexts = partial(_contexts, history)
        return cast(Tensor, _checkpoint(layer, hidden, history, positions, context_fn=contexts))
    _Halves.recomputed = setting == "selective"
    try:
        return layer(hidden, history, positions)
    finally:
        _Halves.recomputed = False


def feed_forward_half(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """part(x), of which autograd keeps only x if feed-forward halves are computed again. It may be part of a compiled graph.

    Args:
        part: the MLP, with its norm and its connection to residual streams; it does not use the layer history.
        x: what it takes, of any shape.
    """
    if not (_Halves.recomputed and torch.is_grad_enabled()):
        return part(x)
    if WeightGradients.active is None:
        return cast(Tensor, _checkpoint(part, x))
    return cast(Tensor, _checkpoint(part, x, context_fn=partial(_contexts, None)))


def _contexts(history: LayerHistory | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Context managers for the forward pass of what is computed again, and for its recomputation."""
    return nullcontext(), _recomputing(history, WeightGradients.active)


@contextmanager
def _recomputing(history: LayerHistory | None, gradients: WeightGradients | None) -> Iterator[None]:
    """What recomputation has in common with the forward pass, where weight gradients go, and what it does not write again."""
    with deferring(gradients), nullcontext() if history is None else history.recomputing():
        yield
