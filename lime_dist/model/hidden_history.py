"""The history of ``routes: hidden``: entries are residual-stream states, mixed per head and then projected to keys and values.

An entry is kept as X̂ = X / rms(X), [N, D]: the normalised state without a reader's weight γ, which is the same for every
reader, so that each state is normalised once. A reader folds γ into its projections: K_h = (Σ_e p[h, e]·X̂_e)·(W_h ⊙ γ)ᵀ.
A boundary is crossed by the states themselves, X, and by summaries, normalised already; what made an entry, and what comes
back for it from later stages, is plain autograd. A summary is U = Σ a_i·X_i over the states of its chunk, a = softmax(A_m).

What it costs, for a layer that reads E entries, in multiply-adds: mixing H·E·N·D, projecting 2·N·D². (Projecting first and
mixing afterwards would cost 2·E·N·D².) Static weights are known before the layers run, so what a block reads from older
entries is one product per run of positions, and so are the gradients of those entries and of the weights; a block has at
most `layout.BLOCK_ROWS` rows (layer, head), for its mixtures [rows, N, D] are in memory, twice in backward. Dynamic weights exist
only once the layer's own state does: such a layer reads by itself. Backward mixes again instead of keeping mixtures.
Memory besides: E·N·D for the entries, and E·N·D in at least float32 for their gradients while backward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory, add_product, product_of_rows
from lime_dist.model.layers import rms_normalise
from lime_dist.model.layout import Block, Chunk, StageLayout
from lime_dist.model.policies import Entry

SLICE_ELEMENTS = 1 << 19
SLICE_ELEMENTS_GPU = 1 << 26
"""Elements of a mixture [H, tokens, D] that are made at a time: a cache's worth; on a GPU enough to fill it (not measured
there). Never less than `SLICE_TOKENS` tokens, for the sake of the matrix products."""
SLICE_TOKENS = 64

Parts = list[tuple[slice, slice]]
"""Columns of a reader's weights, and the positions that they weigh."""


class HiddenHistory(LayerHistory):
    """The history of one micro-batch on one stage. An entry is [N, D].

    Per layer, ascending: ``write``, and ``project`` if the layer reads.
    """

    def __init__(
        self,
        layout: StageLayout,
        num_tokens: int,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ) -> None:
        super().__init__(layout, (num_tokens, hidden_size), dtype, device, keep)
        self.eps = eps
        self._gradients: Tensor | None = None
        self._states: dict[Entry, Tensor] = {}
        self._wanted = {*layout.sent, *(entry for chunk in layout.chunks for entry in chunk.sources)}
        self._summaries: dict[int, Tensor] = {}
        self._first_readers: dict[Block, int] = {}
        self._weights: Tensor | None = None
        self._weight_gradient: Tensor | None = None
        self._partial: tuple[Block, Tensor] | None = None
        self._block_gradient: Tensor | None = None

    # -- what goes in, what goes on -----------------------------------------------------------------------------------

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        batch, length, _ = payload_BTC.shape
        received = self.layout.received
        count = sum(not entry.is_summary for entry in received)
        size = self.entries[:1].numel()
        sizes = [batch * length * hidden_size, count * size, (len(received) - count) * size]
        hidden, slots, summaries = payload_BTC.flatten().split(sizes)
        states_ENd, summaries_ENd = slots.view(count, *self.slot_shape), summaries.view(-1, *self.slot_shape)
        self._remember(received, (*states_ENd.unbind(), *summaries_ENd.unbind()))
        if received:
            entries = torch.cat([rms_normalise(states_ENd, self.eps), summaries_ENd])
            self.dependency = _Write.apply(self.dependency, entries, self, received)
        return hidden.view(batch, length, hidden_size)

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        flat = torch.cat([hidden_BTD.flatten(), *(state.flatten() for state in released)])
        return flat.view(*hidden_BTD.shape[:2], -1)

    def open(self, routing: Sequence[Tensor | None], summaries: Sequence[Tensor]) -> None:
        """Take p [H, E] of the stage's layers (None: no router, or a dynamic one) and A_m [rank, chunk size]."""
        self._summaries = {chunk.index: logits for chunk, logits in zip(self.layout.chunks, summaries, strict=True)}
        for layer, block in reversed(self.layout.blocks.items()):
            if routing[layer - self.layout.start] is not None:
                self._first_readers[block] = layer
        if self._first_readers:
            self.dependency = _Open.apply(self.dependency, self, *routing)

    def release(self) -> list[Tensor]:
        super().release()
        states, self._states, self._summaries = self._states, {}, {}
        return [states[entry] for entry in self.layout.sent if entry in states]

    def write(self, layer: int, entry_ND: Tensor, state_ND: Tensor) -> None:
        """Leave a layer's input in the history: as it is, and divided by its root mean square."""
        dependency = _Write.apply(self.dependency, entry_ND.unsqueeze(0), self, (Entry(layer),))
        if not self.is_recomputing:
            self.dependency = dependency
            self._remember([Entry(layer)], [state_ND])

    def summarise(self, chunk: Chunk) -> None:
        weights = self._summaries[chunk.index].to(self.accumulation_dtype).softmax(-1)
        states = [self._states[entry] for entry in chunk.sources]
        summary = sum(
            (weights[:, i, None, None] * state for i, state in enumerate(states)), torch.zeros_like(self.dependency)
        )
        entries = rms_normalise(summary, self.eps).to(self.entries.dtype)
        self.dependency = _Write.apply(self.dependency, entries, self, tuple(chunk.rows))
        for entry in chunk.sources:
            if entry not in self.layout.sent:
                del self._states[entry]
        self._remember(chunk.rows, entries.unbind())

    def _remember(self, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
        """Keep what is sent on, or summarised later, as it came."""
        self._states.update({e: tensor for e, tensor in zip(entries, tensors, strict=True) if e in self._wanted})

    # -- reading ------------------------------------------------------------------------------------------------------

    def project(self, layer: int, weights: Tensor | None, projections_HcD: Tensor) -> Tensor:
        """Mix the entries that a layer reads and project each head's mixture.

        Args:
            weights: p [N, H, E]; None if they are the same for all tokens, and ``open`` has taken them.
            projections_HcD: rows that each head projects its mixture with.

        Returns:
            [H, N, c].
        """
        projected, dependency = _Project.apply(self.dependency, weights, projections_HcD, self, layer)
        if not self.is_recomputing:
            self.dependency = dependency
        return projected

    @property
    def gradients(self) -> Tensor:
        """[positions, N, D] in at least float32: what the readers visited so far add up to."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.entries, dtype=self.accumulation_dtype)
        return self._gradients

    def _stack(self, routing: Sequence[Tensor | None]) -> Tensor:
        """p of all layers of the stage, [layers, H, positions], 0 where nothing is read."""
        heads = next(len(matrix) for matrix in routing if matrix is not None)
        stacked = self.entries.new_zeros((len(routing), heads, self.layout.num_positions))
        for row, matrix in enumerate(routing):
            if matrix is not None:
                for columns, run in self._columns(row):
                    stacked[row, :, run] = matrix[:, columns]
        return stacked

    def _columns(self, row: int) -> Parts:
        """Where the columns of the weights of the stage's ``row``-th layer belong."""
        found, begin = [], 0
        for run in self.layout.readers[row].columns:
            end = begin + run.stop - run.start
            found.append((slice(begin, end), run))
            begin = end
        return found

    def _open_gradients(self, has_weights: Sequence[bool]) -> list[Tensor | None]:
        stacked, self._weight_gradient = self._weight_gradient, None
        if stacked is None:
            raise RuntimeError("the history's routers were asked for gradients before any layer was visited")
        dtype = self.entries.dtype
        return [
            torch.cat([stacked[row, :, run] for _, run in self._columns(row)], 1).to(dtype) if present else None
            for row, present in enumerate(has_weights)
        ]

    def _hand_out(self, entries: Sequence[Entry]) -> Tensor:
        """[entries, N, D]: the gradient of entries that lie together, once all of their readers have been visited."""
        for entry in entries:
            self._visit_once(entry)
        begin = self.layout.position[entries[0]]
        total = self.gradients[begin : begin + len(entries)]
        if self._keep:
            found = total.clone()
            total.zero_()
            return found
        return total.to(self.entries.dtype)

    def _token_slices(self, num_heads: int) -> Iterator[slice]:
        num_tokens, size = self.slot_shape
        elements = SLICE_ELEMENTS_GPU if self.entries.is_cuda else SLICE_ELEMENTS
        step = max(SLICE_TOKENS, elements // (num_heads * size))
        for begin in range(0, num_tokens, step):
            yield slice(begin, min(begin + step, num_tokens))

    # -- what a block shares (static weights) -------------------------------------------------------------------------

    def _rows(self, layers: range) -> slice:
        return slice(layers[0] - self.layout.start, layers[-1] + 1 - self.layout.start)

    def _older(self, layer: int) -> Tensor | None:
        """[H, N, D]: what a layer mixes of entries older than its block; made for the whole block at once."""
        block = self.layout.blocks[layer]
        if self._weights is None or not block.older.runs:
            return None
        if self._partial is None or self._partial[0] is not block:
            rows = self._weights[self._rows(block.layers)].flatten(0, 1)
            total: Tensor | None = None
            for run in block.older.runs:
                total = add_product(rows[:, run], self.entries[run].flatten(1), total)
            assert total is not None
            self._partial = (block, total.view(len(block.layers), -1, *self.slot_shape))
        return self._partial[1][layer - block.layers[0]]

    def _spread_older(self, block: Block) -> None:
        """Gradient of the block's mixtures -> added to the gradients of older entries and of the weights."""
        if self._weights is None or self._weight_gradient is None or self._block_gradient is None:
            return
        rows = self._rows(block.layers)
        gradient = self._block_gradient.flatten(0, 1).flatten(1)
        weights = self._weights[rows].flatten(0, 1)
        for run in block.older.runs:
            product = product_of_rows(gradient, self.entries[run].flatten(1))
            self._weight_gradient[rows, :, run] = product.view(len(block.layers), -1, run.stop - run.start)
            add_product(weights[:, run].t(), gradient, self.gradients[run].flatten(1))
        self._partial = self._block_gradient = None

    # -- one layer ----------------------------------------------------------------------------------------------------

    def _forward(self, layer: int, weights: Tensor | None, projections_HcD: Tensor) -> Tensor:
        heads, width, _ = projections_HcD.shape
        out = projections_HcD.new_empty(heads, self.slot_shape[0], width)
        older = self._older(layer)
        weights, parts = self._own_reads(layer, weights)
        for tokens in self._token_slices(heads):
            mixture = self._mixture(weights, parts, tokens, older)
            out[:, tokens] = torch.bmm(mixture, projections_HcD.transpose(1, 2))
        if not self.is_recomputing and layer == self.layout.blocks[layer].layers[-1]:
            self._partial = None
        return out

    def _backward(
        self, layer: int, weights: Tensor | None, projections_HcD: Tensor, gradient_HNc: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of dynamic weights and of the projections; those of entries and static weights are kept here."""
        block, own, is_static = self.layout.blocks[layer], layer - self.layout.start, weights is None
        older = self._older(layer)
        weights, parts = self._own_reads(layer, weights)
        if is_static:
            if self._weight_gradient is None:
                assert self._weights is not None
                self._weight_gradient = torch.zeros_like(self._weights, dtype=self.accumulation_dtype)
            weight_gradient = self._weight_gradient[own]
        else:
            weight_gradient = torch.zeros_like(weights, dtype=self.accumulation_dtype)
        mixture_gradients: Tensor | None = None
        if older is not None:
            if self._block_gradient is None:
                self._block_gradient = older.new_zeros(len(block.layers), *older.shape)
            mixture_gradients = self._block_gradient[layer - block.layers[0]]
        projection_gradient = torch.zeros_like(projections_HcD, dtype=self.accumulation_dtype)
        for tokens in self._token_slices(len(projections_HcD)):
            chunk = gradient_HNc[:, tokens]
            mixture = self._mixture(weights, parts, tokens, older)
            projection_gradient += torch.bmm(chunk.transpose(1, 2), mixture)
            mixture_gradient = torch.bmm(chunk, projections_HcD)
            if mixture_gradients is not None:
                mixture_gradients[:, tokens] = mixture_gradient
            self._spread(weights, parts, weight_gradient, tokens, mixture_gradient)
        if is_static and layer == self._first_readers[block]:
            self._spread_older(block)
        return None if is_static else weight_gradient.to(weights.dtype), projection_gradient.to(projections_HcD)

    def _own_reads(self, layer: int, weights: Tensor | None) -> tuple[Tensor, Parts]:
        """The weights of what a layer reads by itself: all entries (dynamic), or those of its own block (static)."""
        row = layer - self.layout.start
        if weights is not None:
            return weights, self._columns(row)
        assert self._weights is not None
        return self._weights[row], [(run, run) for run in self.layout.read_alone[layer].runs]

    def _mixture(self, weights: Tensor, parts: Parts, tokens: slice, older: Tensor | None) -> Tensor:
        """[H, tokens, D] of one chunk."""
        mixed = None if older is None else older[:, tokens]
        for columns, run in parts:
            states_EnD = self.entries[run, tokens]
            if weights.dim() == 2:
                part = (weights[:, columns] @ states_EnD.flatten(1)).view(-1, *states_EnD.shape[1:])
            else:
                part = torch.bmm(weights[tokens, :, columns], states_EnD.transpose(0, 1)).transpose(0, 1)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def _spread(
        self, weights: Tensor, parts: Parts, weight_gradient: Tensor, tokens: slice, gradient_HnD: Tensor
    ) -> None:
        """Gradient of one chunk's mixture -> added to the gradients of the states read and of the weights."""
        for columns, run in parts:
            states_EnD, target_EnD = self.entries[run, tokens], self.gradients[run, tokens]
            if weights.dim() == 2:
                flat = gradient_HnD.flatten(1)
                weight_gradient[:, columns] += product_of_rows(flat, states_EnD.flatten(1))
                target_EnD += (
                    weights[:, columns].t().to(self.accumulation_dtype) @ flat.to(self.accumulation_dtype)
                ).view_as(target_EnD)
            else:
                per_token_nHD = gradient_HnD.transpose(0, 1)
                chosen = weights[tokens, :, columns].transpose(1, 2).to(self.accumulation_dtype)
                weight_gradient[tokens, :, columns] = torch.bmm(per_token_nHD, states_EnD.permute(1, 2, 0))
                target_EnD += torch.bmm(chosen, per_token_nHD.to(self.accumulation_dtype)).transpose(0, 1)


class _Open(torch.autograd.Function):
    """Stacks static weights; in backward, after all layers, hands each layer the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: HiddenHistory, *routing: Tensor | None) -> Tensor:
        ctx.history = history
        ctx.has_weights = [matrix is not None for matrix in routing]
        history._weights = history._stack(routing)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None, *ctx.history._open_gradients(ctx.has_weights)


class _Write(torch.autograd.Function):
    """Writes entries that lie together; in backward, after all of their readers, hands out their gradient."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, entries_END: Tensor, history: HiddenHistory, entries: Sequence[Entry]
    ) -> Tensor:
        ctx.history, ctx.entries = history, entries
        for entry, entry_ND in zip(entries, entries_END, strict=True):
            place = history.entries[history.layout.position[entry]] if entry in history.layout.received else None
            place = history._claim(entry) if place is None else place
            if place is not None:
                place.copy_(entry_ND)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], ctx.history._hand_out(ctx.entries), None, None


class _Project(torch.autograd.Function):
    """Mixes and projects; backward mixes again."""

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
        return history._forward(layer, weights, projections_HcD), torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient_HNc, dependency_gradient = gradients
        weights, projections_HcD = ctx.saved_tensors
        found = ctx.history._backward(ctx.layer, weights, projections_HcD, gradient_HNc)
        return dependency_gradient, *found, None, None
