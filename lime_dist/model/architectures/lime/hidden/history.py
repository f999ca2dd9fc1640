"""The history of ``routes: hidden``: entries are residual-stream states, mixed per head, then projected to keys and values.

An entry is X̂ = X / rms(X), [N, D]: the normalised state without a reader's weight γ. It is the same for every reader, so each
state is normalised once. A reader folds γ into its projections: K_h = (Σ_e p[h, e]·X̂_e)·(W_h ⊙ γ)ᵀ. The states themselves, X,
cross a boundary, and so do summaries, which are normalised already. What made an entry, and the gradient that comes back for
it from later stages, is left to autograd. A summary is U = Σ a_i·X_i over the states of its chunk, a = softmax(A_m).

A layer that reads E entries takes H·E·N·D multiply-adds to mix and 2·N·D² to project. (Projecting before mixing would take
2·E·N·D².) Static weights are known before the layers run, so what a block reads from older entries is one product per run of
positions, and so are the gradients of those entries and of the weights. A block has at most `architecture.BLOCK_ROWS` rows (layer,
head), because its mixtures [rows, N, D] are in memory, twice in backward. A mixture is as large as H entries, so with many heads
blocks do not pay, and every layer reads all of its entries alone. So does a layer with dynamic weights, which exist only once
its own state does. Backward computes mixtures again instead of keeping them. The factors of all products keep their type; the
gradients of entries are summed in at least float32.

Besides, the history takes E·N·D elements for the entries and, while backward runs, E·N·D in at least float32 for their
gradients. `history.py` draws an example of who writes and reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lime_dist.model.architectures.lime.hidden.functions import Borrow, ComeBefore, Project, Write
from lime_dist.model.architectures.lime.hidden.token_slices import Parts, mix_slice, spread_slice, token_slices
from lime_dist.model.chunks import Chunk
from lime_dist.model.history import LayerHistory, OpenWeights
from lime_dist.model.layout import StageLayout
from lime_dist.model.norm_rotation import rms_norm
from lime_dist.model.places import Block, Reader
from lime_dist.model.policies import Entry
from lime_dist.model.products import add_product


class HiddenHistory(LayerHistory):
    """The history of one micro-batch on one stage. An entry is [N, D].

    For each layer in ascending order, call ``write``, then ``project`` if the layer has a router.
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
        # Gradients of weights are sums over slices of tokens, so they take the type of sums.
        accumulation_dtype = torch.promote_types(dtype, torch.float32)
        super().__init__(layout, (num_tokens, hidden_size), 1, dtype, device, accumulation_dtype, keep)
        self.eps = eps
        self._gradients: Tensor | None = None
        self._states: dict[Entry, Tensor] = {}
        self._needed_states = {*layout.outgoing.entries, *(entry for chunk in layout.chunks for entry in chunk.sources)}
        self._kept_states = {  # of entries that a later part summarises
            source
            for chunk in layout.chunks
            for source in chunk.sources
            if layout.part_of[source] < layout.part_of[chunk.rows[0]]
        }
        self._lent_states: dict[Entry, Tensor] = {}
        self._lent_gradients: dict[Entry, Tensor] = {}
        self._summary_logits: dict[int, Tensor] = {}
        self._first_readers: dict[Block, int] = {}
        self._mixture_gradients: Tensor | None = None

    # -- called by the stage and its layers ---------------------------------------------------------------------------

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        batch, length, _ = payload_BTC.shape
        received = self.layout.received[self.part].entries
        num_slots = sum(not entry.is_summary for entry in received)
        size = self.entries[:1].numel()
        sizes = [batch * length * hidden_size, num_slots * size, (len(received) - num_slots) * size]
        hidden, slots, summaries = payload_BTC.flatten().split(sizes)
        states_ENd, summaries_ENd = slots.view(num_slots, *self.slot_shape), summaries.view(-1, *self.slot_shape)
        states = (*states_ENd.unbind(), *summaries_ENd.unbind())
        self._remember(received, states)
        if received:
            entries = torch.cat([rms_norm(states_ENd, None, self.eps), summaries_ENd])
            self.dependency = Write.apply(self.dependency, entries, self, received, *self._lent(received, states))
        return hidden.view(batch, length, hidden_size)

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        states, others = (released[:-1], released[-1:]) if self.layout.kept_for else (released, [])
        flat = torch.cat([hidden_BTD.flatten(), *(state.flatten() for state in states)])
        for dependency in others:
            flat = ComeBefore.apply(dependency, flat)
        return flat.view(*hidden_BTD.shape[:2], -1)

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Take p [H, E] of the stage's layers (None: no router, or a dynamic one) and A_m [rows, chunk size]."""
        self._summary_logits = {
            chunk.index: logits for chunk, logits in zip(self.layout.chunks_of(self.part), others, strict=True)
        }
        for layer, matrix in reversed(list(zip(self.layout.parts[self.part], routing, strict=True))):
            if matrix is not None:
                self._first_readers[self.layout.blocks[layer]] = layer
        num_heads = next((len(matrix) for matrix in routing if matrix is not None), None)
        if num_heads is not None:
            self.dependency = OpenWeights.apply(self.dependency, self, num_heads, *routing)

    def release(self) -> list[Tensor]:
        (dependency,) = super().release()
        states, self._states, self._summary_logits = self._states, {}, {}
        sent = [states[entry] for entry in self.layout.sent[self.part].entries if entry in states]
        return [*sent, dependency] if self.layout.kept_for else sent  # later parts read what this one has written

    def write(self, layer: int, entry_ND: Tensor, state_ND: Tensor) -> None:
        """Write a layer's input to the history.

        Args:
            entry_ND: the input divided by its root mean square.
            state_ND: the input as it is, for a later stage or a summary.
        """
        entry = (Entry(layer),)
        lent = self._lent(entry, (state_ND,))
        self._advance(Write.apply(self.dependency, entry_ND.unsqueeze(0), self, entry, *lent))
        if not self.is_recomputing:
            self._remember([Entry(layer)], [state_ND])

    def summarise(self, chunk: Chunk) -> None:
        weights = self._summary_logits[chunk.index].to(self.accumulation_dtype).softmax(-1)
        states = [
            self._states[entry] if entry in self._states else Borrow.apply(self.dependency, self, entry)
            for entry in chunk.sources
        ]
        summary = sum(
            (weights[:, i, None, None] * state for i, state in enumerate(states)), torch.zeros_like(self.dependency)
        )
        entries = rms_norm(summary, None, self.eps).to(self.entries.dtype)
        self.dependency = Write.apply(self.dependency, entries, self, tuple(chunk.rows))
        for entry in chunk.sources:
            if entry not in self.layout.sent[self.part].entries:
                self._states.pop(entry, None)
        self._remember(chunk.rows, entries.unbind())

    def project(self, layer: int, weights: Tensor | None, projections_HcD: Tensor) -> Tensor:
        """Mix the entries that a layer reads and project each head's mixture.

        Args:
            weights: p [N, H, E]; None if they are the same for all tokens, and ``open`` has taken them.
            projections_HcD: rows with which each head projects its mixture.

        Returns:
            [H, N, c].
        """
        if self.mean_weights is not None and weights is not None:
            self.mean_weights.add(layer, weights.sum(0, dtype=self.accumulation_dtype), len(weights))
        projected, dependency = Project.apply(self.dependency, weights, projections_HcD, self, layer)
        self._advance(dependency)
        return projected

    def _remember(self, entries: Sequence[Entry], states: Sequence[Tensor]) -> None:
        """Keep the states that are sent on or summarised later; they belong to the autograd graph until ``release``."""
        self._states.update({e: state for e, state in zip(entries, states, strict=True) if e in self._needed_states})
        self._lent_states.update(
            zip(self._kept(entries), (s.detach() for s in self._lent(entries, states)), strict=True)
        )

    def _kept(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those of which a later part of the stage needs the state."""
        return [entry for entry in entries if entry in self._kept_states]

    def _lent(self, entries: Sequence[Entry], states: Sequence[Tensor]) -> list[Tensor]:
        """The states of those."""
        return [state for entry, state in zip(entries, states, strict=True) if entry in self._kept_states]

    # -- called by autograd Functions ---------------------------------------------------------------------------------

    def write_entries(self, entries: Sequence[Entry], entries_END: Tensor) -> None:
        """Write entries to their places; those that the stage makes are not written while recomputing."""
        for entry, entry_ND in zip(entries, entries_END, strict=True):
            is_received = entry in self.layout.incoming.entries
            place = self.entries[self.layout.position[entry]] if is_received else self._claim(entry)
            if place is not None:
                place.copy_(entry_ND)

    def lent_state(self, entry: Entry) -> Tensor:
        """The state of an entry that an earlier part has received or made, [N, D]."""
        return self._lent_states[entry]

    def return_gradient(self, entry: Entry, gradient_ND: Tensor) -> None:
        """Keep the gradient of a lent state until the part is visited that has received or made it."""
        before = self._lent_gradients.get(entry)
        self._lent_gradients[entry] = gradient_ND if before is None else before + gradient_ND

    def lent_gradients(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The gradients of the states that later parts have borrowed, of those of ``entries`` that they need."""
        return [self._lent_gradients.pop(entry) for entry in self._kept(entries)]

    def entry_gradients(self, entries: Sequence[Entry]) -> Tensor:
        """[entries, N, D]: the gradient of entries with consecutive positions, once all of their readers are visited."""
        for entry in entries:
            self._visit_once(entry)
        self._check_kept(entries)
        begin = self.layout.position[entries[0]]
        total = self.gradients[begin : begin + len(entries)]
        if self._keep:  # backward may run again: start from zero then
            result = total.clone()
            total.zero_()
            return result
        return total.to(self.entries.dtype)

    def mix_and_project(self, layer: int, weights: Tensor | None, projections_HcD: Tensor) -> Tensor:
        """See `project`."""
        heads, width, _ = projections_HcD.shape
        out = projections_HcD.new_empty(heads, self.slot_shape[0], width)
        # 1. What the whole block reads from older entries: one product, computed for the block's first reading layer.
        older = self._mixture_of_older(layer)
        # 2. Add what the layer reads alone and project, a slice of tokens at a time.
        weights, parts = self._read_alone(layer, weights)
        for tokens in token_slices(self.entries, heads):
            mixture = mix_slice(self.entries, weights, parts, tokens, older)
            torch.bmm(mixture, projections_HcD.transpose(1, 2), out=out[:, tokens])
        # 3. Forget the block after its last layer. A recomputed layer keeps it: its backward comes next and uses it.
        if not self.is_recomputing and layer == self.layout.blocks[layer].layers[-1]:
            self._older_mixtures.drop()
        return out

    def visit(
        self, layer: int, weights: Tensor | None, projections_HcD: Tensor, gradient_HNc: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Add to the gradients of all entries that a layer reads, given the gradient of what ``project`` returned.

        Returns:
            The gradient of dynamic weights (that of static ones stays here until ``weight_gradients``), and that of the
            projections.
        """
        block, row, is_static = self.layout.blocks[layer], self.layout.row[layer], weights is None
        # 1. The mixtures again, which forward did not keep.
        older = self._mixture_of_older(layer)
        weights, parts = self._read_alone(layer, weights)
        if is_static:
            weight_gradient = self._stacked_gradient[row].squeeze(-1)
        else:
            weight_gradient = torch.zeros_like(weights, dtype=self.accumulation_dtype)
        # 2. Where the layer's g_ℓ is kept for the block; the block's last reading layer, the first visited, makes the tensor.
        mixture_gradients: Tensor | None = None
        if older is not None:
            if self._mixture_gradients is None:
                self._mixture_gradients = older.new_zeros(len(block.layers), *older.shape)
            mixture_gradients = self._mixture_gradients[layer - block.layers[0]]
        projection_gradient = torch.zeros_like(projections_HcD, dtype=self.accumulation_dtype)
        for tokens in token_slices(self.entries, len(projections_HcD)):
            gradient_Hnc = gradient_HNc[:, tokens]
            mixture = mix_slice(self.entries, weights, parts, tokens, older)
            projection_gradient += torch.bmm(gradient_Hnc.transpose(1, 2), mixture)
            # 3. Through the projection: g_ℓ, the gradient of the layer's mixture.
            mixture_gradient = torch.bmm(gradient_Hnc, projections_HcD)
            if mixture_gradients is not None:
                mixture_gradients[:, tokens] = mixture_gradient
            # 4. g_ℓ goes on at once to the entries that the layer read alone, its own included, and to their weights.
            spread_slice(self.entries, self.gradients, weights, weight_gradient, parts, tokens, mixture_gradient)
        del older, mixture, mixture_gradient, mixture_gradients  # step 5 needs memory, too
        # 5. After the block's first reading layer, the last one visited, the g of all its layers go on to older entries.
        if is_static and layer == self._first_readers[block]:
            self._spread_to_older(block)
        return None if is_static else weight_gradient.to(weights.dtype), projection_gradient.to(projections_HcD)

    @property
    def gradients(self) -> Tensor:
        """[positions, N, D] in ``accumulation_dtype``: the sum over the readers visited so far."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.entries, dtype=self.accumulation_dtype)
        return self._gradients

    # -- what a block shares (static weights) -------------------------------------------------------------------------

    def _weighted_readers(self, part: int) -> list[tuple[Reader, slice]]:
        layers = self.layout.parts[part]  # A_m of summaries are autograd's
        readers = self.layout.readers_by_part[part][: len(layers)]
        rows = (self.layout.row[layer] for layer in layers)
        return [(reader, slice(row, row + 1)) for row, reader in zip(rows, readers, strict=True)]

    def _rows_of(self, block: Block) -> slice:
        """Rows of ``weights`` of a block's layers."""
        return slice(self.layout.row[block.layers[0]], self.layout.row[block.layers[-1]] + 1)

    def _matrix_of(self, block: Block) -> Tensor:
        """Weights of a block's layers, [layers · H, positions]."""
        return self.weights[self._rows_of(block)].flatten(0, 1).squeeze(-1)

    def _mixture_of_older(self, layer: int) -> Tensor | None:
        """[H, N, D]: what a layer mixes of entries older than its block, computed for the whole block at once; None if
        there is nothing, or if the weights are dynamic."""
        block = self.layout.blocks[layer]
        if not self._first_readers or not block.older.runs:
            return None
        return self._older_mixtures.get(block, partial(self._mixtures_of_older, block))[layer - block.layers[0]]

    def _mixtures_of_older(self, block: Block) -> Tensor:
        """[layers of the block, H, N, D]."""
        matrix = self._matrix_of(block)
        total = self._sum_over_runs(lambda run: matrix[:, run], self.entries, block.older.runs)
        return total.view(len(block.layers), -1, *self.slot_shape)

    def _spread_to_older(self, block: Block) -> None:
        """Add the gradients of the block's mixtures to those of the older entries, and set those of the weights."""
        if self._mixture_gradients is None:
            return
        self._older_mixtures.drop()
        gradient = self._mixture_gradients.flatten(0, 1).flatten(1)
        matrix = self._matrix_of(block)
        for run in block.older.runs:
            self._set_weight_gradient(self._rows_of(block), [run], gradient)
            add_product(matrix[:, run].t(), gradient, self._flat(self.gradients, run))
        self._mixture_gradients = None

    # -- what a layer reads alone -------------------------------------------------------------------------------------

    def _read_alone(self, layer: int, weights: Tensor | None) -> tuple[Tensor, Parts]:
        """The weights and positions of what a layer reads alone: all of its entries (dynamic weights, [N, H, E]), or what
        its block does not read for it (static weights, [H, positions])."""
        row = self.layout.row[layer]
        if weights is not None:
            return weights, self.layout.reader_of[layer].weight_columns
        return self.weights[row].squeeze(-1), [(run, run) for run in self.layout.read_alone[layer].runs]
