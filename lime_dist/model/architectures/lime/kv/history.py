"""The history of ``routes: kv``: slots are keys and values; a layer mixes its own with those of earlier layers.

`history.py` draws how one buffer serves entries and gradients. In formulas: a mixture is linear, M_r = Σ_e W[r, e]·S_e, so the
gradient of an entry is Σ_r W[r, e]ᵀ·g_r over its readers r, where g_r is the gradient of M_r. Backward visits readers from last
to first; a visited reader leaves g_r in the place of its own entry, which nobody reads any more. Forward reads what older
layers left, backward what newer layers left, in the same memory. The gradient of an entry is a sum of a few products, one per
run of readers. Each product sums in at least float32 and is rounded once.

A chunk's summary is a reader like a layer: it mixes the slots of its chunk with A_m, and its entry is the mixture itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lime_dist.model.architectures.lime.kv.functions import Mix, Pack, Summarise, Unpack
from lime_dist.model.chunks import Chunk
from lime_dist.model.crossing import Crossing
from lime_dist.model.history import BlockTensor, LayerHistory, OpenWeights, separate_view
from lime_dist.model.layout import StageLayout
from lime_dist.model.places import Places, Reader, paired_runs
from lime_dist.model.policies import Entry
from lime_dist.model.products import add_product


class KeyValueHistory(LayerHistory):
    """The history of one micro-batch on one stage. A slot is [G, 2, N, d]: keys and values before rotation.

    With ``keep``, gradients have a buffer of their own. ``lead`` is the number of elements of the hidden state of a payload
    that is received into the history's own memory (``landing``): received entries come first, so nothing is copied.

    Attributes:
        gradients: [positions, G, 2, N, d]: ``entries`` itself without ``keep``. After a reader's visit, the place of its
            entry holds the gradient of the reader's mixture.
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
        # Each gradient of a weight is one product, set once, so that the entries' type is precise enough.
        super().__init__(layout, (num_heads, 2, num_tokens, head_size), num_heads, dtype, device, dtype, keep, lead)
        self.gradients = torch.zeros_like(self.entries) if keep else self.entries
        self._sent_gradient: Tensor | None = None  # for what ``_sent`` says: of the part whose backward pass is running
        self._sent = Crossing()
        self._newer_gradients = BlockTensor()
        self._newer_summary_gradients = BlockTensor()

    # -- called by the stage and its layers ---------------------------------------------------------------------------

    def landing(self, shape_BTC: tuple[int, ...]) -> Tensor:
        """The memory to receive a payload into, [B, T, C]; pass it to ``unpack`` afterwards."""
        return separate_view(self.memory, shape_BTC)

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        hidden, self.dependency = Unpack.apply(payload_BTC, hidden_size, self)
        return hidden

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        return Pack.apply(*released, hidden_BTD, self)

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Take R_ℓ [G, entries read · G] of the stage's layers (None: no router), A_m [rows·G, chunk size·G] of its chunks, and the
        same of later layers and chunks."""
        self.dependency = OpenWeights.apply(self.dependency, self, self.entry_heads, *routing, *others)

    def mix(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's slot and return the keys and values that its attention uses, [G, N, d] each."""
        mixed, dependency = Mix.apply(self.dependency, k_NGd, v_NGd, self, layer)
        self._advance(dependency)
        key, value = mixed.unbind(1)
        return key, value

    def summarise(self, chunk: Chunk) -> None:
        self.dependency = Summarise.apply(self.dependency, self, chunk)

    # -- called by autograd Functions in forward ----------------------------------------------------------------------

    def take_weights(self, reader_heads: int, weights: Sequence[Tensor | None]) -> None:
        super().take_weights(reader_heads, weights)
        for (reader, rows), matrix in zip(self._weighted_readers(self.part), weights, strict=True):
            if matrix is None:  # no router: the mixture is the layer's own slot
                self.weights[rows.start, :, reader.rows.start].diagonal().fill_(1)

    def take_received(self, entries: Tensor) -> None:
        """Copy what was received, entries and partial mixtures [received, G, 2, N, d], to its places."""
        begin = sum(map(len, self.layout.received[: self.part]))
        self.entries[begin : begin + len(entries)].copy_(entries)

    def write_slot(self, layer: int, k_NGd: Tensor, v_NGd: Tensor) -> None:
        """Write a layer's keys and values to its place; does nothing while recomputing."""
        slot = self._claim(Entry(layer))
        if slot is not None:
            slot[:, 0].copy_(k_NGd.transpose(0, 1))
            slot[:, 1].copy_(v_NGd.transpose(0, 1))

    def read_mixture(self, layer: int) -> Tensor:
        """M_ℓ [G, 2, N, d]."""
        layout, heads = self.layout, self.entry_heads
        block, position = layout.blocks[layer], layout.slot(layer)
        own = slice(position, position + 1)
        # 1. What earlier stages have mixed, and what all layers of the block read from older entries: one product, computed for
        #    the block's first layer.
        if block.older.runs:
            of_block = self._older_mixtures.get(block, partial(self._continued_mixture, block.own, block.older))
            begin = block.own.index_of(position) * heads
            shared: Tensor | None = of_block[begin : begin + heads].clone()
        else:
            shared = self._received_mixtures(Places((position,)))
        # 2. What this layer reads alone, its own slot included.
        mixed = self._mixture(own, layout.read_alone[layer], shared)
        # 3. Forget the block after its last layer; recomputation in backward runs its layers from last to first.
        if layer == (block.layers[0] if self.is_recomputing else block.layers[-1]):
            self._older_mixtures.drop()
        return mixed.view(self.slot_shape)

    def write_summary(self, chunk: Chunk) -> None:
        """Write U_m = A_m·[slots of the chunk] to its rows' places."""
        rows = self.layout.places(chunk.rows)
        for row in chunk.rows:
            self._claim(row)
        place, received = self._flat(self.entries, rows.runs[0]), self._received_mixtures(rows)
        total = None if received is None else place.copy_(received)
        self._mixture(rows, self.layout.sources(chunk), total, out=place)

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """[entries and partial mixtures sent, G, 2, N, d]."""
        return len(self.layout.sent[self.part]), *self.slot_shape

    def write_sent(self, target: Tensor) -> None:
        """Write what crosses the next boundary into ``target``: entries, then partial mixtures, to which this stage adds its part."""
        layout = self.layout
        entries = layout.sent[self.part].entries
        for index, entry in enumerate(entries):
            target[index].copy_(self.entries[layout.position[entry]])
        mixtures = target[len(entries) :]
        for places, positions in layout.passed_mixtures:
            mixtures[places].copy_(self.entries[positions])
        for group in layout.later_groups:
            for run in group.rows.runs:
                place = self._flat(mixtures, run)
                total, out = (None, place) if group.begins else (place, None)
                self._sum_over_runs(partial(self._later_weights, run), self.entries, group.entries.runs, total, out)

    # -- called by autograd Functions in backward ---------------------------------------------------------------------

    def take_sent_gradient(self, part: int, gradient: Tensor) -> None:
        """Keep the gradient that comes back for what a part has sent, [entries and partial mixtures sent, G, 2, N, d], and set that of
        the weights in the partial mixtures: all entries are still there."""
        self._sent, self._sent_gradient = self.layout.sent[part], gradient
        for group in self.layout.later_groups:
            for run in group.rows.runs:
                of_mixtures = self._flat(self._mixture_gradients, run)
                self._set_weight_gradient(self._later_rows(run), group.entries.runs, of_mixtures)

    def visit(self, layer: int, gradient: Tensor) -> Tensor:
        """Take g_ℓ, leave it in the place of S_ℓ, and return the gradient of S_ℓ.

        All newer readers have been visited: their places hold the gradients of their mixtures. Both gradients are
        [G, 2, N, d].
        """
        layout = self.layout
        self._visit_once(Entry(layer))
        self._check_kept([Entry(layer)])
        block, position = layout.blocks[layer], layout.slot(layer)
        own = slice(position, position + 1)

        # 1. Gradients of the weights of what the layer read alone. This needs S_ℓ, so it comes before step 2.
        flat = gradient.reshape(self.entry_heads, -1)
        self._set_weight_gradient(self._weight_rows(own), layout.read_alone[layer].runs, flat)

        # 2. Nobody reads S_ℓ any more: its place takes g_ℓ.
        self.gradients[position].copy_(gradient)

        # 3. What the block's slots get from later stages and from the readers that read all of them: one product per run,
        #    computed when the block's last layer is visited, the first one in backward.
        total: Tensor | None = None
        entries = [Entry(one) for one in block.layers]
        if block.readers.runs or self._come_back(entries):
            of_block = self._newer_gradients.get(
                block, partial(self._shared_gradient, block.own, block.readers, entries)
            )
            total = of_block[block.own.index_of(position)].view(self.entry_heads, -1)

        # 4. Add what S_ℓ gets from its other readers: layer ℓ itself, whose g_ℓ step 2 left here, newer layers of the block,
        #    and newer readers that read only some of the block's slots.
        total = self._gradient_of_readers(own, layout.readers_alone[layer], total)

        # 5. The block's first layer is the last one in backward: the places of the block's slots now hold g of all its
        #    layers. Older entries are still there, so the weights that the block shares get their gradients.
        if layer == block.layers[0]:
            for run in block.own.runs:
                self._set_weight_gradient(self._weight_rows(run), block.older.runs, self._flat(self.gradients, run))
            self._newer_gradients.drop()
        return total.view(self.slot_shape)

    def visit_summary(self, chunk: Chunk) -> None:
        """Compute the gradient of U_m and, from it, that of A_m; leave the gradient of U_m in the places of its rows.

        U_m is the mixture and the entry in one. Its gradient as an entry, which its readers give it, is therefore its gradient
        as a reader of the chunk's slots.
        """
        layout = self.layout
        for row in chunk.rows:
            self._visit_once(row)
        self._check_kept(chunk.rows)
        rows, block = layout.places(chunk.rows), layout.summary_blocks[chunk.index]
        place = self._flat(self.gradients, rows.runs[0])
        others = layout.other_readers(chunk.rows[0], block.readers)  # all rows of a summary have the same readers
        if block.readers.runs:
            entries = [row for row in self.layout.own if self.layout.position[row] in block.own.positions]
            of_block = self._newer_summary_gradients.get(
                block, partial(self._shared_gradient, block.own, block.readers, entries)
            )
            begin = block.own.index_of(rows.positions[0])
            place.copy_(of_block[begin : begin + len(rows)].view_as(place))
            self._gradient_of_readers(rows, others, place)
        else:
            self._shared_gradient(rows, others, chunk.rows, place)
        if chunk.layers.start == block.layers.start:
            self._newer_summary_gradients.drop()
        self._set_weight_gradient(self._weight_rows(rows.runs[0]), layout.sources(chunk).runs, place)

    def received_gradient(self, part: int, out: Tensor) -> None:
        """Write the gradient to send back over the boundary before a part, [received, G, 2, N, d], once all of its layers have been
        visited. That of a partial mixture is that of the mixture."""
        layout = self.layout
        entries = layout.received[part].entries
        self._check_kept(entries)
        if entries:
            shared = layout.shared_readers(entries)
            places = layout.places(entries)
            self._shared_gradient(places, shared, entries, self._flat(out, slice(0, len(entries))))
            for index, entry in enumerate(entries):
                place = slice(layout.position[entry], layout.position[entry] + 1)
                self._gradient_of_readers(place, layout.other_readers(entry, shared), out[index].flatten(1))
        for reader, position in layout.mixture_position.items():
            if reader in layout.position:
                out[position].copy_(self.gradients[layout.position[reader]])
            else:
                out[position].copy_(self._mixture_gradients[layout.outgoing.mixtures.index(reader)])

    # -- products -----------------------------------------------------------------------------------------------------

    def _weighted_readers(self, part: int) -> list[tuple[Reader, slice]]:
        here = [(reader, self._weight_rows(reader.rows)) for reader in self.layout.readers_by_part[part]]
        return here + [(reader, self._later_rows(reader.rows)) for reader in self.layout.later_readers]

    def _weight_rows(self, positions: slice) -> slice:
        """Rows of ``weights`` of the readers whose own entries have these positions."""
        first = self.layout.first_own
        return slice(positions.start - first, positions.stop - first)

    def _later_rows(self, places: slice) -> slice:
        """Rows of ``weights`` of the readers of later stages with these places among the mixtures sent."""
        own = len(self.layout.own)
        return slice(own + places.start, own + places.stop)

    def _later_weights(self, places: slice, entries: slice) -> Tensor:
        """`_weights_between` for readers of later stages."""
        return self.weights[self._later_rows(places), :, entries].flatten(0, 1).flatten(1)

    def _weights_between(self, readers: Places | slice, entries: Places | slice) -> Tensor:
        """The weights of some readers for some entries as a matrix: rows (reader, head), columns (entry, head)."""
        reader_runs = [readers] if isinstance(readers, slice) else readers.runs
        entry_runs = [entries] if isinstance(entries, slice) else entries.runs
        parts = [_joined([self.weights[self._weight_rows(r), :, e] for e in entry_runs], 2) for r in reader_runs]
        return _joined(parts, 0).flatten(0, 1).flatten(1)

    def _mixture(
        self, readers: Places | slice, entries: Places, total: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """What readers mix of entries, rows (reader, head); added to ``total`` in place, or else in ``out``."""
        return self._sum_over_runs(partial(self._weights_between, readers), self.entries, entries.runs, total, out)

    def _received_mixtures(self, readers: Places) -> Tensor | None:
        """A copy of what earlier stages have mixed for readers of this stage, rows (reader, head); None: nothing for any of them."""
        layout = self.layout
        received = [layout.mixture_position.get(layout.own[place - layout.first_own]) for place in readers.positions]
        if all(position is None for position in received):
            return None
        total = self.entries.new_empty(len(readers), *self.slot_shape)
        if None in received:
            total.zero_()
        for places, positions in paired_runs(received):
            total[places].copy_(self.entries[positions])
        return self._flat(total, slice(0, len(readers)))

    def _continued_mixture(self, readers: Places, entries: Places) -> Tensor:
        """What earlier stages have mixed for readers of this stage, and what these mix of ``entries``, rows (reader, head)."""
        return self._mixture(readers, entries, self._received_mixtures(readers))

    @property
    def _mixture_gradients(self) -> Tensor:
        """The gradients that came back for the partial mixtures sent, [partial mixtures, G, 2, N, d]."""
        assert self._sent_gradient is not None
        return self._sent_gradient[len(self._sent.entries) :]

    def _come_back(self, entries: Sequence[Entry]) -> bool:
        """Whether later stages contribute to the gradient of some of these entries."""
        return self._sent_gradient is not None and not self.layout.come_back.isdisjoint(entries)

    def _shared_gradient(
        self, places: Places, readers: Places, entries: Sequence[Entry], out: Tensor | None = None
    ) -> Tensor:
        """What entries get from later stages and from the readers on this stage that read all of them.

        Args:
            out: rows (entry, head), in the order of ``places``; None: a new tensor.

        Returns:
            [entries, G, 2, N, d] in the order of ``places``.
        """
        shape = (len(places), *self.slot_shape)
        total: Tensor | None = None  # the first product fills the memory, unless something else must be in it
        if self._come_back(entries) or not readers.runs:
            total = self.entries.new_empty(shape).flatten(0, 1).flatten(1) if out is None else out
            by_place = total.view(shape).zero_()
            for entry in entries:
                if self._sent_gradient is not None and entry in self._sent.entries:
                    index = places.index_of(self.layout.position[entry])
                    by_place[index] = self._sent_gradient[self._sent.entries.index(entry)]
            self._add_gradient_of_later_readers(places, total)
        return self._gradient_of_readers(places, readers, total, out).view(shape)

    def _add_gradient_of_later_readers(self, places: Places, total: Tensor) -> None:
        """Add to the gradients of entries, rows (entry, head), what they get from the partial mixtures that they are part of."""
        for group in self.layout.later_groups:
            for entries in Places(tuple(p for p in places.positions if p in group.entries.positions)).runs:
                begin = places.index_of(entries.start) * self.entry_heads
                rows = total[begin : begin + (entries.stop - entries.start) * self.entry_heads]
                for run in group.rows.runs:
                    add_product(self._later_weights(run, entries).t(), self._flat(self._mixture_gradients, run), rows)

    def _gradient_of_readers(
        self, entries: Places | slice, readers: Places, total: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """Σ_r W[r, e]ᵀ·g_r, rows (entry, head), added to ``total`` in place, or else in ``out``; every g_r lies in its reader's
        place."""
        return self._sum_over_runs(
            lambda run: self._weights_between(run, entries).t(), self.gradients, readers.runs, total, out
        )


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
