"""The history of ``routes: hidden``: slots are residual-stream states, mixed per head and then projected to keys and values.

A slot is X̂ = X / rms(X), [N, D]: the normalised state without a reader's weight γ, which is the same for every reader, so
that each state is normalised once. A reader folds γ into its projections: K_h = (Σ_e p[h, e]·X̂_e)·(W_h ⊙ γ)ᵀ.

What it costs, for a layer that reads E entries, in multiply-adds: mixing H·E·N·D, projecting 2·N·D². (Projecting first and
mixing afterwards would cost 2·E·N·D².) The mixture [H, N, D] is never whole in memory: tokens are taken in chunks of
`CHUNK_ELEMENTS` elements of it, and backward mixes again instead of keeping it, so that a layer mixes 4 times in all
(forward, again in backward, gradient of the states, gradient of the weights) and keeps nothing but its weights p.
Memory: E·N·D for the states, in the precision of the run, and E·N·D in at least float32 for their gradients while
backward runs; the form that keeps each layer's mixture holds H·N·D a layer beside its copy of the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory, StageLayout

CHUNK_ELEMENTS = 1 << 19
CHUNK_ELEMENTS_GPU = 1 << 26
"""Elements of a mixture [H, tokens, D] that are in memory at a time: a cache's worth; on a GPU enough to fill it (not
measured there). Never less than `CHUNK_TOKENS` tokens, for the sake of the matrix products."""
CHUNK_TOKENS = 64


class HiddenHistory(LayerHistory):
    """The history of one micro-batch on one stage. A slot is [N, D], a state divided by its root mean square.

    Use, in this order: construct; unpack a payload into it (all stages but the first); then per layer, ascending,
    ``write``, and ``project`` if the layer reads.
    """

    def __init__(
        self,
        layout: StageLayout,
        num_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ) -> None:
        super().__init__(layout, (num_tokens, hidden_size), dtype, device, keep)
        self._gradients: Tensor | None = None

    def write(self, layer: int, state_ND: Tensor) -> None:
        """Leave a layer's normalised input in the history."""
        token = _Write.apply(self.token, state_ND, self, layer)
        if not self.is_recomputing:
            self.token = token

    def project(self, layer: int, weights: Tensor, projections_HcD: Tensor) -> Tensor:
        """Mix the entries that a layer reads and project each head's mixture.

        Args:
            weights: p, [H, E] for all tokens alike, or [N, H, E].
            projections_HcD: rows that each head projects its mixture with.

        Returns:
            [H, N, c].
        """
        projected, token = _Project.apply(self.token, weights, projections_HcD, self, layer)
        if not self.is_recomputing:
            self.token = token
        return projected

    def received_gradient(self) -> Tensor:
        return self.gradients[: len(self.layout.received)].to(self.entries.dtype)

    @property
    def gradients(self) -> Tensor:
        """[positions, N, D] in at least float32: what the readers visited so far, here and on later stages, add up to."""
        if self._gradients is None:
            slots = [*self.layout.received, *range(self.layout.start, self.layout.stop)]
            self._gradients = self._incoming_gradient(slots, torch.promote_types(self.entries.dtype, torch.float32))
        return self._gradients

    def _hand_out(self, layer: int) -> Tensor:
        """The gradient of a slot, once all of its readers have been visited."""
        self._visit_once(layer)
        total = self.gradients[self.layout.position(layer)]
        if self._keep:
            found = total.clone()
            total.zero_()
            return found
        return total.to(self.entries.dtype)

    def _chunks(self, num_heads: int) -> Iterator[slice]:
        num_tokens, size = self.slot_shape
        elements = CHUNK_ELEMENTS_GPU if self.entries.is_cuda else CHUNK_ELEMENTS
        step = max(CHUNK_TOKENS, elements // (num_heads * size))
        for begin in range(0, num_tokens, step):
            yield slice(begin, min(begin + step, num_tokens))

    def _mixture(self, layer: int, weights: Tensor, tokens: slice) -> Tensor:
        """[H, tokens, D] of one chunk."""
        mixed: Tensor | None = None
        for columns, run in self._columns(layer):
            states_EnD = self.entries[run, tokens]
            if weights.dim() == 2:
                part = (weights[:, columns] @ states_EnD.flatten(1)).view(-1, *states_EnD.shape[1:])
            else:
                part = torch.bmm(weights[tokens, :, columns], states_EnD.transpose(0, 1)).transpose(0, 1)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def _spread(
        self, layer: int, weights: Tensor, weight_gradient: Tensor, tokens: slice, gradient_HnD: Tensor
    ) -> None:
        """Gradient of one chunk's mixture -> added to the gradients of the states read and of the weights."""
        exact = self.gradients.dtype
        for columns, run in self._columns(layer):
            states_EnD, target_EnD = self.entries[run, tokens], self.gradients[run, tokens]
            if weights.dim() == 2:
                flat = gradient_HnD.flatten(1)
                weight_gradient[:, columns] += flat @ states_EnD.flatten(1).t()
                target_EnD.view(len(target_EnD), -1).addmm_(weights[:, columns].t().to(exact), flat.to(exact))
            else:
                per_token_nHD = gradient_HnD.transpose(0, 1)
                chosen = weights[tokens, :, columns]
                weight_gradient[tokens, :, columns] = torch.bmm(per_token_nHD, states_EnD.permute(1, 2, 0))
                target_EnD += torch.bmm(chosen.transpose(1, 2).to(exact), per_token_nHD.to(exact)).transpose(0, 1)

    def _columns(self, layer: int) -> Iterator[tuple[slice, slice]]:
        """Columns of a layer's weights and the positions that they weigh, as contiguous runs."""
        begin = 0
        for run in self.layout.runs_by_layer[layer]:
            yield slice(begin, begin + run.stop - run.start), run
            begin += run.stop - run.start


class _Write(torch.autograd.Function):
    """Writes a slot; in backward, after all of its readers, hands out its gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state_ND: Tensor, history: HiddenHistory, layer: int) -> Tensor:
        ctx.history, ctx.layer = history, layer
        slot = history._claim(layer)
        if slot is not None:
            slot.copy_(state_ND)
        return torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], ctx.history._hand_out(ctx.layer), None, None


class _Project(torch.autograd.Function):
    """Mixes and projects chunk by chunk; backward mixes again."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, weights: Tensor, projections_HcD: Tensor, history: HiddenHistory, layer: int
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.layer = history, layer
        ctx.save_for_backward(weights, projections_HcD)
        heads, width, _ = projections_HcD.shape
        out = projections_HcD.new_empty(heads, history.slot_shape[0], width)
        for tokens in history._chunks(heads):
            mixture = history._mixture(layer, weights, tokens)
            out[:, tokens] = torch.bmm(mixture, projections_HcD.transpose(1, 2))
        return out, torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient_HNc, token_gradient = gradients
        history: HiddenHistory = ctx.history
        weights, projections_HcD = ctx.saved_tensors
        exact = history.gradients.dtype
        weight_gradient = torch.zeros_like(weights, dtype=exact)
        projection_gradient = torch.zeros_like(projections_HcD, dtype=exact)
        for tokens in history._chunks(len(projections_HcD)):
            chunk = gradient_HNc[:, tokens]
            mixture = history._mixture(ctx.layer, weights, tokens)
            projection_gradient += torch.bmm(chunk.transpose(1, 2), mixture)
            mixture_gradient = torch.bmm(chunk, projections_HcD)
            history._spread(ctx.layer, weights, weight_gradient, tokens, mixture_gradient)
        return token_gradient, weight_gradient.to(weights), projection_gradient.to(projections_HcD), None, None
