"""The history of ``routes: kv``: slots are keys and values, a layer's own are mixed with those of earlier layers.

How the gradient is made without a second buffer. A mixture is linear, M_ℓ = Σ_e R_ℓ[e]·S_e, so the gradient of an
entry is Σ_ℓ R_ℓ[e]ᵀ·g_ℓ over its readers, g_ℓ being the gradient of M_ℓ. Backward visits layers from last to first, and
once layer ℓ has been visited nobody reads S_ℓ any more: its place takes g_ℓ. Forward reads what older layers left,
backward reads what newer layers left, in the same memory. Each gradient is one product over all readers, accumulated
inside the matrix product in at least float32, so nothing stagnates in low precision however many readers there are; in
bf16 a slot's gradient rounds at most once per part (newer blocks, own block, next stage).

Reads are blocked: what `BLOCK` consecutive layers read from entries older than the block is one product of their stacked
weights; so is the gradient of the block's entries from newer layers, and so is the gradient of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory, StageLayout


class KeyValueHistory(LayerHistory):
    """The history of one micro-batch on one stage. A slot is [G, 2, N, d]: keys and values before rotation.

    Use, in this order: construct; unpack a payload into it (all stages but the first); ``open``; ``mix`` once per layer,
    ascending. With ``keep`` gradients have a buffer of their own.
    """

    def __init__(
        self,
        layout: StageLayout,
        num_heads: int,
        head_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ) -> None:
        super().__init__(layout, (num_heads, 2, num_tokens, head_size), dtype, device, keep)
        self.num_heads = num_heads
        self.gradients = torch.zeros_like(self.entries) if keep else self.entries
        self._weights = torch.empty(0)
        self._weight_gradient: Tensor | None = None
        self._partial: tuple[int, Tensor | None] | None = None
        self._newer: tuple[int, Tensor] | None = None

    # -- forward ------------------------------------------------------------------------------------------------------

    def open(self, routers: Sequence[Tensor | None]) -> None:
        """Take the routers of the stage's layers, ascending: R_ℓ [G, entries read · G], None for a layer without one."""
        self.token = _Open.apply(self.token, self, *routers)

    def mix(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's slot and return the keys and values that its attention uses, [G, N, d] each."""
        mixed, token = _Mix.apply(self.token, k_NGd, v_NGd, self, layer)
        if not self.is_recomputing:
            self.token = token
        key, value = mixed.unbind(1)
        return key, value

    def _stack(self, routers: Sequence[Tensor | None]) -> Tensor:
        """All routers of the stage as one matrix: rows (layer, head), columns (position, head), 0 where nothing is read."""
        layout, heads = self.layout, self.num_heads
        stacked = self.entries.new_zeros((layout.stop - layout.start, heads, layout.num_positions, heads))
        for row, router in enumerate(routers):
            layer = layout.start + row
            if router is None:
                stacked[row, :, layout.position(layer)] = torch.eye(heads)
                continue
            router = router.view(heads, -1, heads)
            begin = 0
            for run in layout.runs_by_layer[layer]:
                end = begin + run.stop - run.start
                stacked[row, :, run] = router[:, begin:end]
                begin = end
        return stacked.view(-1, layout.num_positions * heads)

    def _flat(self, tensor: Tensor, positions: slice) -> Tensor:
        """Positions of a buffer as a matrix: rows (position, head), columns (2, N, d)."""
        return tensor[positions].view((positions.stop - positions.start) * self.num_heads, -1)

    def _block_weights(self, rows: slice, positions: slice) -> Tensor:
        heads = self.num_heads
        return self._weights[rows.start * heads : rows.stop * heads, positions.start * heads : positions.stop * heads]

    def _rows(self, block: range) -> slice:
        return slice(block.start - self.layout.start, block.stop - self.layout.start)

    def _write(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> None:
        slot = self._claim(layer)
        if slot is not None:
            slot[:, 0].copy_(k_NGd.transpose(0, 1))
            slot[:, 1].copy_(v_NGd.transpose(0, 1))

    def _read(self, layer: int) -> Tensor:
        """M_ℓ [G, 2, N, d] = what the block reads from older entries (one product) + what ℓ reads within the block."""
        layout, heads = self.layout, self.num_heads
        block = layout.block(layer)
        if self._partial is None or self._partial[0] != block.start:
            partial: Tensor | None = None
            for run in layout.older_runs[block.start]:
                weights, older = self._block_weights(self._rows(block), run), self._flat(self.entries, run)
                partial = weights @ older if partial is None else partial.addmm_(weights, older)
            self._partial = (block.start, partial)
        partial = self._partial[1]
        row = layer - layout.start
        inside = slice(layout.position(block.start), layout.position(layer) + 1)
        weights, entries = self._block_weights(slice(row, row + 1), inside), self._flat(self.entries, inside)
        if partial is None:
            mixed = weights @ entries
        else:
            begin = (layer - block.start) * heads
            mixed = torch.addmm(partial[begin : begin + heads], weights, entries)
        if layer == (block.start if self.is_recomputing else block.stop - 1):
            self._partial = None
        return mixed.view(self.slot_shape)

    # -- backward -----------------------------------------------------------------------------------------------------

    def _visit(self, layer: int, gradient: Tensor) -> Tensor:
        """Take g_ℓ [G, 2, N, d], leave it in the slot's place, and return the gradient of the slot S_ℓ."""
        layout, heads = self.layout, self.num_heads
        self._visit_once(layer)
        block = layout.block(layer)
        begin, position, end = (
            layout.position(block.start),
            layout.position(layer),
            layout.position(block.stop - 1) + 1,
        )
        row = layer - layout.start

        inside = slice(begin, position + 1)
        flat_gradient = gradient.reshape(heads, -1)
        self._add_weight_gradient(slice(row, row + 1), inside, flat_gradient)
        self.gradients[position].copy_(gradient)

        if self._newer is None or self._newer[0] != block.start:
            self._newer = (block.start, self._gradient_from_newer(block))
        rest = slice(position, end)
        readers = self._block_weights(slice(row, row + end - position), slice(position, position + 1))
        slot_gradient = torch.addmm(self._newer[1][layer - block.start], readers.t(), self._flat(self.gradients, rest))

        if layer == block.start:
            block_gradient = self._flat(self.gradients, slice(begin, end))
            for run in layout.older_runs[block.start]:
                self._add_weight_gradient(self._rows(block), run, block_gradient)
            self._newer = None
        return slot_gradient.view(self.slot_shape)

    def _gradient_from_newer(self, block: range) -> Tensor:
        """[layers of the block, G, 2·N·d]: what layers after the block, here and on later stages, add to its slots."""
        layout, heads = self.layout, self.num_heads
        positions = slice(layout.position(block.start), layout.position(block.stop - 1) + 1)
        total = self._incoming_gradient(block, self.entries.dtype).view(len(block) * heads, -1)
        first_own = len(layout.received)
        for rows in layout.newer_runs[block.start]:
            newer = slice(first_own + rows.start, first_own + rows.stop)
            total.addmm_(self._block_weights(rows, positions).t(), self._flat(self.gradients, newer))
        return total.view(len(block), heads, -1)

    def received_gradient(self) -> Tensor:
        """[entries received, G, 2, N, d]: the gradient to send back over the boundary before this stage."""
        layout, heads = self.layout, self.num_heads
        count = len(layout.received)
        total = self._incoming_gradient(layout.received, self.entries.dtype)
        rows = slice(0, layout.stop - layout.start)
        total.view(count * heads, -1).addmm_(
            self._block_weights(rows, slice(0, count)).t(),
            self._flat(self.gradients, slice(count, layout.num_positions)),
        )
        return total

    def _add_weight_gradient(self, rows: slice, positions: slice, gradient: Tensor) -> None:
        """gradient [rows·G, 2·N·d] of the mixtures × the entries they read -> gradient of the stacked weights."""
        if self._weight_gradient is None:
            self._weight_gradient = torch.zeros_like(self._weights)
        heads = self.num_heads
        self._weight_gradient[
            rows.start * heads : rows.stop * heads, positions.start * heads : positions.stop * heads
        ] += gradient @ self._flat(self.entries, positions).t()

    def _router_gradients(self, has_router: Sequence[bool]) -> list[Tensor | None]:
        layout, heads = self.layout, self.num_heads
        if self._weight_gradient is None:
            raise RuntimeError("the history's routers were asked for gradients before any layer was visited")
        stacked = self._weight_gradient.view(-1, heads, layout.num_positions, heads)
        self._weight_gradient = None
        return [
            stacked[row][:, layout.read_positions(layout.start + row)].reshape(heads, -1) if present else None
            for row, present in enumerate(has_router)
        ]


class _Open(torch.autograd.Function):
    """Stacks the routers; in backward, after all layers, hands each router its gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, history: KeyValueHistory, *routers: Tensor | None) -> Tensor:
        ctx.history = history
        ctx.has_router = [router is not None for router in routers]
        history._weights = history._stack(routers)
        return torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None, *ctx.history._router_gradients(ctx.has_router)


class _Mix(torch.autograd.Function):
    """Writes a slot and reads a mixture; in backward, gradient of the mixture -> gradient of the slot."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, k_NGd: Tensor, v_NGd: Tensor, history: KeyValueHistory, layer: int
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.layer = history, layer
        history._write(layer, k_NGd, v_NGd)
        return history._read(layer), torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient, token_gradient = gradients
        slot_gradient = ctx.history._visit(ctx.layer, gradient)
        key, value = slot_gradient.unbind(1)
        return token_gradient, key.transpose(0, 1), value.transpose(0, 1), None, None
