"""The autograd Functions of `HiddenHistory`: what writes entries and what mixes them, and in which order backward does.

Each takes the ``dependency`` of the operation before it and returns one for the next (see `history.py`). They hold the
history, do nothing themselves, and call its public methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lime_dist.model.policies import Entry

if TYPE_CHECKING:
    from lime_dist.model.architectures.lime.hidden.history import HiddenHistory


class Write(torch.autograd.Function):
    """Writes entries with consecutive positions; in backward, after all of their readers, returns their gradient, and those of the
    states that later parts of the stage borrow."""

    @staticmethod
    def forward(
        ctx: Any,
        dependency: Tensor,
        entries_END: Tensor,
        history: HiddenHistory,
        entries: Sequence[Entry],
        *lent_ND: Tensor,
    ) -> Tensor:
        ctx.history, ctx.entries = history, entries
        history.write_entries(entries, entries_END)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # All readers have been visited: they depend on this operation, so autograd runs their backward first.
        history: HiddenHistory = ctx.history
        return gradients[0], history.entry_gradients(ctx.entries), None, None, *history.lent_gradients(ctx.entries)


class ComeBefore(torch.autograd.Function):
    """A payload, behind all operations on the history: their backward runs although nothing of this graph may read what they wrote."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, payload: Tensor) -> Tensor:
        return payload.view_as(payload)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0].new_zeros(()), gradients[0]


class Borrow(torch.autograd.Function):
    """The state of an entry that an earlier part of the stage has received or made; in backward, its gradient waits there."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: HiddenHistory, entry: Entry) -> Tensor:
        ctx.history, ctx.entry = history, entry
        return history.lent_state(entry).detach()  # a tensor of its own: the history must not hold the graph

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.history.return_gradient(ctx.entry, gradients[0])
        return gradients[0].new_zeros(()), None, None


class Project(torch.autograd.Function):
    """Mixes entries and projects the mixtures; saves no mixture: backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        dependency: Tensor,
        weights: Tensor | None,
        projections_HcD: Tensor,
        history: HiddenHistory,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.layer = history, layer
        ctx.save_for_backward(weights, projections_HcD)
        return history.mix_and_project(layer, weights, projections_HcD), torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient_HNc, dependency_gradient = gradients
        weights, projections_HcD = ctx.saved_tensors
        # The history adds to the gradients of the entries read; `Write` hands them out when their turn comes.
        weight_gradient, projection_gradient = ctx.history.visit(ctx.layer, weights, projections_HcD, gradient_HNc)
        return dependency_gradient, weight_gradient, projection_gradient, None, None
