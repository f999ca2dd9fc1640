"""The history of ``routes: kv``: slots are keys and values, a layer's own are mixed with those of earlier layers.

How the gradient is made without a second buffer. A mixture is linear, M_r = Σ_e W[r, e]·S_e, so the gradient of an entry is
Σ_r W[r, e]ᵀ·g_r over its readers, g_r being the gradient of M_r. Backward visits readers from last to first, and once a
reader has been visited nobody reads its own entry any more: its place takes g_r. Forward reads what older layers left,
backward reads what newer ones left, in the same memory. Each gradient is a sum of a few products, one per run of readers,
made and added up in at least float32 and rounded once, so nothing stagnates in low precision however many readers there are.

A chunk's summary is a reader like a layer: it mixes the slots of its chunk with A_m, and its entry is the mixture itself.

Reads are blocked: what a block of layers reads from entries older than the block is one product (per run of positions); so
is the gradient of the block's entries from newer readers, and so is the gradient of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.history import LayerHistory, add_product, product_of_rows, stranger
from lime_dist.model.layout import Block, Chunk, Places, StageLayout
from lime_dist.model.policies import Entry


class KeyValueHistory(LayerHistory):
    """The history of one micro-batch on one stage. A slot is [G, 2, N, d]: keys and values before rotation.

    With ``keep`` gradients have a buffer of their own. With ``lead``, the elements of a hidden state, a payload may be
    received into the history's own memory (``landing``): received entries come first, so that nothing is copied.
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
        lead: int = 0,
    ) -> None:
        super().__init__(layout, (num_heads, 2, num_tokens, head_size), dtype, device, keep, lead)
        self.num_heads = num_heads
        self.gradients = torch.zeros_like(self.entries) if keep else self.entries
        self._incoming: Tensor | None = None
        self._weights = torch.empty(0)
        self._weight_gradient: Tensor | None = None
        self._partial: tuple[Block, Tensor] | None = None
        self._newer: tuple[Block, Tensor] | None = None

    # -- forward ------------------------------------------------------------------------------------------------------

    def landing(self, shape_BTC: tuple[int, ...]) -> Tensor:
        """The memory that a payload is to be received into, [B, T, C]; then give it to ``unpack``."""
        return stranger(self.memory, shape_BTC)

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        hidden, self.dependency = _Unpack.apply(payload_BTC, hidden_size, self)
        return hidden

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        return _Pack.apply(*released, hidden_BTD, self)

    def open(self, routing: Sequence[Tensor | None], summaries: Sequence[Tensor]) -> None:
        """Take R_ℓ [G, entries read · G] of the stage's layers (None: no router) and A_m [rank·G, chunk size·G]."""
        self.dependency = _Open.apply(self.dependency, self, *routing, *summaries)

    def mix(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's slot and return the keys and values that its attention uses, [G, N, d] each."""
        mixed, dependency = _Mix.apply(self.dependency, k_NGd, v_NGd, self, layer)
        if not self.is_recomputing:
            self.dependency = dependency
        key, value = mixed.unbind(1)
        return key, value

    def summarise(self, chunk: Chunk) -> None:
        self.dependency = _Summarise.apply(self.dependency, self, chunk)

    def _stack(self, weights: Sequence[Tensor | None]) -> Tensor:
        """All weights of the stage, [readers, G, positions, G]; readers in the order of their positions; 0: not read."""
        layout, heads = self.layout, self.num_heads
        stacked = self.entries.new_zeros((len(layout.own), heads, layout.num_positions, heads))
        for reader, matrix in zip(layout.readers, weights, strict=True):
            rows = self._rows(reader.rows)
            if matrix is None:
                stacked[rows.start, :, reader.columns[-1].stop - 1] = torch.eye(heads)
                continue
            matrix = matrix.view(rows.stop - rows.start, heads, -1, heads)
            begin = 0
            for run in reader.columns:
                end = begin + run.stop - run.start
                stacked[rows, :, run] = matrix[:, :, begin:end]
                begin = end
        return stacked

    def _unstack(self, stacked: Tensor, has_weights: Sequence[bool]) -> list[Tensor | None]:
        """The parts of ``_stack``'s result again."""
        return [
            torch.cat([stacked[self._rows(reader.rows), :, run] for run in reader.columns], 2).flatten(0, 1).flatten(1)
            if present
            else None
            for reader, present in zip(self.layout.readers, has_weights, strict=True)
        ]

    def _rows(self, positions: slice) -> slice:
        """Rows of the stacked weights of the readers at these positions."""
        received = len(self.layout.received)
        return slice(positions.start - received, positions.stop - received)

    def _between(self, readers: Places | slice, entries: Places | slice) -> Tensor:
        """The weights of some readers for some entries as a matrix: rows (reader, head), columns (entry, head)."""
        rows = [readers] if isinstance(readers, slice) else readers.runs
        columns = [entries] if isinstance(entries, slice) else entries.runs
        parts = [torch.cat([self._weights[self._rows(r), :, c] for c in columns], 2) for r in rows]
        return torch.cat(parts).flatten(0, 1).flatten(1)

    def _flat(self, tensor: Tensor, positions: slice) -> Tensor:
        """Positions of a buffer as a matrix: rows (position, head), columns (2, N, d)."""
        return tensor[positions].view((positions.stop - positions.start) * self.num_heads, -1)

    def _write(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> None:
        slot = self._claim(Entry(layer))
        if slot is not None:
            slot[:, 0].copy_(k_NGd.transpose(0, 1))
            slot[:, 1].copy_(v_NGd.transpose(0, 1))

    def _read(self, layer: int) -> Tensor:
        """M_ℓ [G, 2, N, d] = what the block reads from older entries (one product) + what ℓ reads within the block."""
        layout, heads = self.layout, self.num_heads
        block = layout.blocks[layer]
        position = layout.slot(layer)
        mixed: Tensor | None = None
        if block.older.runs:
            if self._partial is None or self._partial[0] is not block:
                self._partial = (block, self._mixture(block.own, block.older))
            begin = block.own.index_of(position) * heads
            mixed = self._partial[1][begin : begin + heads]
        mixed = self._mixture(slice(position, position + 1), layout.read_alone[layer], mixed)
        if layer == (block.layers[0] if self.is_recomputing else block.layers[-1]):
            self._partial = None
        return mixed.view(self.slot_shape)

    def _mixture(self, readers: Places | slice, entries: Places, start: Tensor | None = None) -> Tensor:
        """What readers mix of entries, rows (reader, head); added to ``start``, which is left alone."""
        total = None if start is None else start.clone()
        for run in entries.runs:
            total = add_product(self._between(readers, run), self._flat(self.entries, run), total)
        assert total is not None
        return total

    def _write_summary(self, chunk: Chunk) -> None:
        layout = self.layout
        rows = layout.places(chunk.rows)
        for row in chunk.rows:
            self._claim(row)
        self._flat(self.entries, rows.runs[0]).copy_(self._mixture(rows, layout.places(chunk.sources)))

    # -- backward -----------------------------------------------------------------------------------------------------

    def _visit(self, layer: int, gradient: Tensor) -> Tensor:
        """Take g_ℓ [G, 2, N, d], leave it in the slot's place, and return the gradient of the slot S_ℓ."""
        layout, heads = self.layout, self.num_heads
        self._visit_once(Entry(layer))
        block, position = layout.blocks[layer], layout.slot(layer)
        own = slice(position, position + 1)
        self._add_weight_gradient(own, layout.read_alone[layer], gradient.reshape(heads, -1))
        self.gradients[position].copy_(gradient)

        if self._newer is None or self._newer[0] is not block:
            entries = [Entry(found) for found in block.layers]
            self._newer = (block, self._pull(block.own, block.readers, entries))
        total = self._newer[1][block.own.index_of(position)]
        self._pull_alone(total, own, layout.readers_alone[layer])

        if layer == block.layers[0]:
            for rows in block.own.runs:
                self._add_weight_gradient(rows, block.older, self._flat(self.gradients, rows))
            self._newer = None
        return total

    def _visit_summary(self, chunk: Chunk) -> None:
        """Make the gradient of U_m, of A_m from it, and leave it in the summary's place."""
        layout = self.layout
        for row in chunk.rows:
            self._visit_once(row)
        rows = layout.places(chunk.rows)
        gradient = self._pull(rows, layout.shared_readers(chunk.rows), chunk.rows).to(self.entries.dtype)
        gradient = gradient.view(len(rows) * self.num_heads, -1)
        self._add_weight_gradient(rows.runs[0], layout.places(chunk.sources), gradient)
        self._flat(self.gradients, rows.runs[0]).copy_(gradient)

    def _pull(self, places: Places, readers: Places, entries: Sequence[Entry]) -> Tensor:
        """[entries, G, 2, N, d] in the order of ``places``, in ``accumulation_dtype``: what they have from later stages, and from readers
        here that read all of them."""
        shape = (len(places), *self.slot_shape)
        sent = [] if self._incoming is None else [entry for entry in entries if entry in self.layout.sent]
        flat: Tensor | None = None
        if sent or not readers.runs or self.accumulation_dtype != self.entries.dtype:
            flat = self.entries.new_zeros(shape, dtype=self.accumulation_dtype).view(len(places) * self.num_heads, -1)
        for entry in sent:
            assert flat is not None and self._incoming is not None
            index = places.index_of(self.layout.position[entry])
            flat.view(shape)[index] = self._incoming[self.layout.sent.index(entry)]
        for run in readers.runs:
            flat = add_product(self._between(run, places).t(), self._flat(self.gradients, run), flat)
        assert flat is not None
        return flat.view(shape)

    def _pull_alone(self, total: Tensor, place: slice, readers: Places) -> None:
        """Add to one entry's gradient what it has from some readers here."""
        flat = total.view(self.num_heads, -1)
        for run in readers.runs:
            add_product(self._between(run, place).t(), self._flat(self.gradients, run), flat)

    def received_gradient(self) -> Tensor:
        """[entries received, G, 2, N, d]: the gradient to send back over the boundary before this stage."""
        layout = self.layout
        shared = layout.shared_readers(layout.received)
        total = self._pull(layout.places(layout.received), shared, layout.received)
        for position, entry in enumerate(layout.received):
            self._pull_alone(total[position], slice(position, position + 1), layout.other_readers(entry, shared))
        return total

    def _add_weight_gradient(self, readers: slice, entries: Places, gradient: Tensor) -> None:
        """gradient [readers·G, 2·N·d] of mixtures × the entries that they read -> gradient of the stacked weights."""
        if self._weight_gradient is None:
            self._weight_gradient = torch.zeros_like(self._weights)
        heads = self.num_heads
        for run in entries.runs:
            product = product_of_rows(gradient, self._flat(self.entries, run))
            self._weight_gradient[self._rows(readers), :, run] = product.view(-1, heads, run.stop - run.start, heads)

    def _open_gradients(self, has_weights: Sequence[bool]) -> list[Tensor | None]:
        if self._weight_gradient is None:
            raise RuntimeError("the history's routers were asked for gradients before any layer was visited")
        stacked, self._weight_gradient = self._weight_gradient, None
        return self._unstack(stacked, has_weights)


class _Open(torch.autograd.Function):
    """Stacks the weights; in backward, after all layers, hands each reader the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: KeyValueHistory, *weights: Tensor | None) -> Tensor:
        ctx.history = history
        ctx.has_weights = [matrix is not None for matrix in weights]
        history._weights = history._stack(weights)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None, *ctx.history._open_gradients(ctx.has_weights)


class _Mix(torch.autograd.Function):
    """Writes a slot and reads a mixture; in backward, gradient of the mixture -> gradient of the slot."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, k_NGd: Tensor, v_NGd: Tensor, history: KeyValueHistory, layer: int
    ) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.layer = history, layer
        history._write(layer, k_NGd, v_NGd)
        return history._read(layer), torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gradient, dependency_gradient = gradients
        slot_gradient = ctx.history._visit(ctx.layer, gradient)
        key, value = slot_gradient.to(gradient.dtype).unbind(1)
        return dependency_gradient, key.transpose(0, 1), value.transpose(0, 1), None, None


class _Summarise(torch.autograd.Function):
    """Writes a chunk's summary; in backward, after all of its readers, makes its gradient."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, history: KeyValueHistory, chunk: Chunk) -> Tensor:
        ctx.history, ctx.chunk = history, chunk
        history._write_summary(chunk)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.history._visit_summary(ctx.chunk)
        return gradients[0], None, None


class _Pack(torch.autograd.Function):
    """Copies the entries that cross a boundary behind the hidden state; in backward, keeps what comes back for them."""

    @staticmethod
    def forward(ctx: Any, dependency: Tensor, hidden_BTD: Tensor, history: KeyValueHistory) -> Tensor:
        ctx.history, ctx.hidden_shape = history, hidden_BTD.shape
        sent = [history.layout.position[entry] for entry in history.layout.sent]
        batch, length, size = hidden_BTD.shape
        width = size + len(sent) * history.entries[0].numel() // (batch * length)
        payload = hidden_BTD.new_empty(batch, length, width)
        flat = payload.view(-1)
        flat[: hidden_BTD.numel()] = hidden_BTD.reshape(-1)
        entries = flat[hidden_BTD.numel() :].view(len(sent), *history.slot_shape)
        for index, position in enumerate(sent):
            entries[index].copy_(history.entries[position])
        return payload

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        history: KeyValueHistory = ctx.history
        flat = gradients[0].contiguous().view(-1)
        size = ctx.hidden_shape.numel()
        history._incoming = flat[size:].view(len(history.layout.sent), *history.slot_shape)
        return flat.new_zeros(()), flat[:size].view(ctx.hidden_shape), None


class _Unpack(torch.autograd.Function):
    """Takes received entries into the history; in backward, sends back their gradient."""

    @staticmethod
    def forward(ctx: Any, payload_BTC: Tensor, hidden_size: int, history: KeyValueHistory) -> tuple[Tensor, Tensor]:
        ctx.history, ctx.payload_shape = history, payload_BTC.shape
        batch, length, _ = payload_BTC.shape
        flat = payload_BTC.contiguous().view(-1)
        size = batch * length * hidden_size
        if payload_BTC.data_ptr() == history.memory.data_ptr():  # it landed here
            hidden = stranger(history.memory, (batch, length, hidden_size))
        else:
            received = flat[size:].view(-1, *history.slot_shape)
            history.entries[: len(received)].copy_(received)
            hidden = flat[:size].view(batch, length, hidden_size).clone()
        return hidden, torch.zeros_like(history.dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden_gradient = gradients[0]
        payload_gradient = hidden_gradient.new_empty(ctx.payload_shape)
        flat = payload_gradient.view(-1)
        flat[: hidden_gradient.numel()] = hidden_gradient.reshape(-1)
        flat[hidden_gradient.numel() :] = ctx.history.received_gradient().view(-1)
        return payload_gradient, None, None
