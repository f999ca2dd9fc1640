"""The layer history: one buffer that holds the entries of one micro-batch on one stage.

Every entry is stored once. Layers write their slots and read entries in place, so L layers take O(L) memory; a concatenation
per layer would take O(L²). `policies.py` says which entries a layer reads and `layout.py` where they lie. This file has what
the two kinds of route share; `architectures/lime/kv/history.py` and `architectures/lime/hidden/history.py` have the rest.
tests/support/reference.py computes the same mixtures with nested loops (``mix`` for ``routes: kv``, ``hidden_logits`` for
``routes: hidden``): read it first.

An example: three layers on one stage, full history, one head
-------------------------------------------------------------
S_ℓ is the slot of layer ℓ, M_ℓ the mixture that its attention uses, and w_ℓe the weight of entry e in it. Layer 0 has no
router with ``routes: kv``, so w_00 = 1. g_ℓ and ∂ are gradients of the loss: g_ℓ of M_ℓ, ∂S_e of S_e, ∂w_ℓe of w_ℓe.

    M_0 = w_00·S_0                              ∂S_0 = w_00·g_0 + w_10·g_1 + w_20·g_2
    M_1 = w_10·S_0 + w_11·S_1                   ∂S_1 =            w_11·g_1 + w_21·g_2
    M_2 = w_20·S_0 + w_21·S_1 + w_22·S_2        ∂S_2 =                       w_22·g_2        ∂w_ℓe = ⟨g_ℓ, S_e⟩

``routes: kv`` has one buffer for entries and gradients. Backward visits layers from last to first. Once layer ℓ has been
visited, S_ℓ is no longer needed, and g_ℓ overwrites it:

                            place 0   place 1   place 2
    before forward             ·         ·         ·
    mix(0) writes S_0         S_0        ·         ·       returns M_0
    mix(1) writes S_1         S_0       S_1        ·       returns M_1
    mix(2) writes S_2         S_0       S_1       S_2      returns M_2
    ---- forward is done; backward brings g_2 first ----
    visit(2, g_2)             S_0       S_1       g_2      ∂w_20, ∂w_21, ∂w_22 from S_0, S_1, S_2; returns ∂S_2
    visit(1, g_1)             S_0       g_1       g_2      ∂w_10, ∂w_11 from S_0, S_1;             returns ∂S_1
    visit(0, g_0)             g_0       g_1       g_2      ∂w_00 from S_0 (unused: no router);     returns ∂S_0

Follow ∂S_0. Layer 2 contributes w_20·g_2, but visit(2) only leaves g_2 in place 2. visit(1) leaves g_1 in place 1. visit(0)
finds all that it needs in the buffer: it leaves g_0 in place 0 and returns w_00·g_0 + w_10·g_1 + w_20·g_2 as the gradient of layer
0's keys and values. This sum is a matrix product for every run of neighbouring readers, at most a few. A product sums in at
least float32 and rounds once, so small contributions are not lost to rounding in low precision, however many layers read the
slot.

``routes: hidden`` keeps its entries through backward and has a second buffer, in at least float32, for their gradients. The
backward of ``project(ℓ)`` adds w_ℓe·g_ℓ to the gradient of every entry e that layer ℓ reads; the backward of ``write(ℓ)``,
which comes after all readers of S_ℓ, hands that gradient out. ∂S_0 is w_20·g_2 after layer 2, w_20·g_2 + w_10·g_1 after
layer 1, and complete when the backward of ``write(0)`` returns it.

Blocked reads
-------------
One matrix product per layer and entry would be too small to be efficient. The layers of a block (at most
`Architecture.max_block_layers`) therefore read together what all of them read from entries older than the block. Rows are layers, columns are entries, blocks have 3 layers:

             0  1  2 | 3  4  5 | 6
    layer 3  ■  ■  ■ | □       |          ■  read by the block: one product for the whole rectangle
    layer 4  ■  ■  ■ | □  □    |          □  read by the layer alone
    layer 5  ■  ■  ■ | □  □  □ |
    layer 6  ▲  ▲  ▲ | ▲  ▲  ▲ | □        ▲  read by the next block, layers 6, 7 and 8

The first layer of a block computes the rectangle for the block, and every layer adds what it reads alone. The gradients of
the weights in a rectangle are one product, too, as soon as the block's first layer has been visited. With ``routes: kv`` the
gradients of the slots 3, 4 and 5 are one product of the weights ▲ in their columns, plus for each slot the readers in □.

Stages
------
A mixture may be summed by several stages, one after the other (`crossing.py`). With ``routes: kv``, a stage writes what it adds to the
mixture of a later layer into its payload when it packs it. A partial mixture that was received has a place in the buffer like an
entry; its layer's mixture starts from it. The gradient of a partial mixture is that of the mixture: it comes back with the
gradients of entries, gives its share to every entry that the stage added, and is sent back unchanged.

Parts
-----
A stage may hold several parts of the decoder (`crossing.Cut`). They share one history of a micro-batch: a later part reads, in
place, what an earlier one has received or made. Each part has an autograd graph of its own. Backward visits the parts from last to
first, and what a later part computes for the gradient of an entry is there when the part is visited that received or made it: with
``routes: kv`` it is the g of the later readers. `StageLayout.kept_for` says which readers those are, and a missing one is an error.

Order
-----
Autograd does not see the buffer, so the order of writers and readers is made explicit: every operation takes the
``dependency`` (a scalar in the autograd graph) that the previous operation returned, and returns a new one. Backward then runs the operations
in exactly the reverse order. The operations are autograd Functions (`kv/functions.py`, `hidden/functions.py`,
`OpenWeights` here). They hold the history and call its public methods; the history never holds the graph after `release`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.chunks import Chunk
from lime_dist.model.layout import StageLayout
from lime_dist.model.mean_weights import MeanWeights
from lime_dist.model.places import Block, Reader
from lime_dist.model.policies import Entry
from lime_dist.model.products import add_product, product, product_of_rows


class LayerHistory:
    """What both kinds of route share.

    Use, in this order: construct; ``unpack`` a payload (all stages but the first); ``open``; run the layers in ascending
    order and ``summarise`` each chunk after its last layer; ``release``; ``pack`` a payload (all stages but the last). For each
    further part ``begin_part``, and the same again.

    Args:
        slot_shape: shape of one entry.
        entry_heads: number of heads per entry; a reader has a separate weight for each.
        weight_gradient_dtype: type in which gradients of the readers' weights are kept until they are handed out.
        keep: allow backward to run several times over one graph, at the cost of memory (gradient checkers need it).
            Otherwise it can run once.
        lead: elements before the entries in the same memory, where the hidden state of a payload can be received.

    Attributes:
        part: the part of the stage whose forward pass is running, or was the last to run.
        mean_weights: where reads with weights that depend on the token add them; None: nobody asks.
        memory: [lead + all entries].
        entries: [positions, *slot_shape]: every entry that this stage holds.
        dependency: the scalar that orders the operations on this history in the autograd graph.
        accumulation_dtype: type of sums in several steps: that of the entries, at least float32.
        weights: [reader rows, reader heads, positions, entry heads]: the weights of all readers, 0 where nothing is read.
    """

    part: int = 0
    mean_weights: MeanWeights | None = None

    def __init__(
        self,
        layout: StageLayout,
        slot_shape: tuple[int, ...],
        entry_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        weight_gradient_dtype: torch.dtype,
        keep: bool = False,
        lead: int = 0,
    ) -> None:
        self.layout, self.slot_shape, self.entry_heads = layout, slot_shape, entry_heads
        self.memory = torch.empty(lead + layout.num_positions * math.prod(slot_shape), dtype=dtype, device=device)
        self.entries = self.memory[lead:].view(layout.num_positions, *slot_shape)
        self.dependency = torch.zeros((), dtype=dtype, device=device)
        self.accumulation_dtype = torch.promote_types(dtype, torch.float32)
        self.weights = torch.empty(0)
        self.is_recomputing = False
        self._weight_gradient: Tensor | None = None
        self._weight_gradient_dtype = weight_gradient_dtype
        self._older_mixtures = BlockTensor()
        self._keep = keep
        self._written: set[Entry] = set(layout.incoming.entries)
        self._visited: set[Entry] = set()

    # -- called by the stage ------------------------------------------------------------------------------------------

    def begin_part(self, part: int) -> None:
        """Begin the forward pass of a part of the stage that is not its first."""
        self.part, self.dependency = part, torch.zeros_like(self.dependency.detach())

    def landing(self, shape_BTC: tuple[int, ...]) -> Tensor:
        """The memory that the payload of the first part is to be received into, [B, T, C]; then pass it to ``unpack``. Only for
        architectures with ``receives_in_place``."""
        raise NotImplementedError

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        """Take the entries of a payload; returns its hidden state [B, T, D]."""
        raise NotImplementedError

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Take the weights of the stage's readers.

        Args:
            routing: for each layer of the part, ascending, the weights with which it mixes entries; None if they are unknown before
                it runs, or if it has no router.
            others: A_m of the chunks that the part summarises, ascending; then the weights of the readers of later stages to
                whose partial mixtures it adds (`StageLayout.later_readers`).
        """
        raise NotImplementedError

    def summarise(self, chunk: Chunk) -> None:
        """Compute the summary of a chunk whose last layer has run."""
        raise NotImplementedError

    def release(self) -> list[Tensor]:
        """Hand over, for ``pack``, the tensors that belong to the autograd graph, once the last layer has run.

        The graph holds the history. If the history held the graph as well, they would form a cycle that Python's garbage
        collector cannot see, and neither would ever be freed.
        """
        dependency, self.dependency = self.dependency, self.dependency.detach()
        return [dependency]

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        """The payload [B, T, elements per token]: the hidden state, then the entries and the partial mixtures that cross the
        boundary."""
        raise NotImplementedError

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within this context, activation checkpointing runs layers again: slots are read and not written."""
        self.is_recomputing = True
        try:
            yield
        finally:
            self.is_recomputing = False

    # -- called by `OpenWeights` ---------------------------------------------------------------------------------------

    def take_weights(self, reader_heads: int, weights: Sequence[Tensor | None]) -> None:
        """Stack the weights of a part's readers, each [rows · reader heads, entries read · entry heads], into ``weights``."""
        readers = self._weighted_readers(self.part)
        if not len(self.weights):
            every = (readers for part in range(len(self.layout.parts)) for readers in self._weighted_readers(part))
            num_rows = max(rows.stop for _, rows in every)
            shape = (num_rows, reader_heads, self.layout.num_positions, self.entry_heads)
            self.weights = self.entries.new_zeros(shape)
        for (reader, rows), matrix in zip(readers, weights, strict=True):
            if matrix is not None:
                parts = matrix.reshape(rows.stop - rows.start, reader_heads, -1, self.entry_heads)
                for columns, run in reader.weight_columns:
                    self.weights[rows, :, run] = parts[:, :, columns]

    def weight_gradients(self, part: int, has_weights: Sequence[bool]) -> list[Tensor | None]:
        """The gradient of the weights of each reader of a part, in the shape in which `take_weights` took them; call it once, after
        all readers of the part have been visited.

        Raises:
            RuntimeError: no reader has been visited.
        """
        stacked, self._weight_gradient = self._weight_gradient, None
        if stacked is None:
            raise RuntimeError("the history has no gradients of router weights: no layer has run backward yet")
        return [
            self._unstacked(stacked, reader, rows) if present else None
            for (reader, rows), present in zip(self._weighted_readers(part), has_weights, strict=True)
        ]

    def _unstacked(self, stacked: Tensor, reader: Reader, rows: slice) -> Tensor:
        """A reader's part of a tensor like ``weights``, [rows · reader heads, entries read · entry heads]; 0 for entries that are
        not on this stage."""
        parts = self.entries.new_zeros(rows.stop - rows.start, stacked.shape[1], reader.num_columns, self.entry_heads)
        for columns, run in reader.weight_columns:
            parts[:, :, columns] = stacked[rows, :, run]
        return parts.flatten(0, 1).flatten(1)

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def _weighted_readers(self, part: int) -> list[tuple[Reader, slice]]:
        """The readers whose weights ``open`` takes for a part, in that order, each with its rows of ``weights``."""
        raise NotImplementedError

    @property
    def _stacked_gradient(self) -> Tensor:
        """The gradient of ``weights``, as far as readers have been visited."""
        if self._weight_gradient is None:
            self._weight_gradient = torch.zeros_like(self.weights, dtype=self._weight_gradient_dtype)
        return self._weight_gradient

    def _set_weight_gradient(self, rows: slice, runs: Sequence[slice], gradient: Tensor) -> None:
        """Set the gradient of the weights of readers for runs of positions from the gradient of the readers' mixtures,
        [rows · reader heads, elements]."""
        for run in runs:
            of_run = product_of_rows(gradient, self._flat(self.entries, run))
            num_entries = run.stop - run.start
            self._stacked_gradient[rows, :, run] = of_run.view(
                rows.stop - rows.start, -1, num_entries, self.entry_heads
            )

    def _flat(self, buffer: Tensor, positions: slice) -> Tensor:
        """Positions of a buffer as a matrix: rows (position, entry head), columns the other dimensions of an entry."""
        return buffer[positions].view((positions.stop - positions.start) * self.entry_heads, -1)

    def _sum_over_runs(
        self,
        weights_of: Callable[[slice], Tensor],
        buffer: Tensor,
        runs: Sequence[slice],
        total: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum of weights_of(run) @ (the run's positions in ``buffer``) over all runs: added to ``total`` in place, or else
        in ``out`` or in a new tensor."""
        for run in runs:
            matrix = self._flat(buffer, run)
            total = (
                product(weights_of(run), matrix, out) if total is None else add_product(weights_of(run), matrix, total)
            )
        assert total is not None
        return total

    def _advance(self, dependency: Tensor) -> None:
        """Let the next operation come after the one that returned ``dependency``; a recomputed one is in order already."""
        if not self.is_recomputing:
            self.dependency = dependency

    def _claim(self, entry: Entry) -> Tensor | None:
        """The place in which an entry is to be written, once and in turn; None while recomputing.

        Raises:
            RuntimeError: it is not this entry's turn.
        """
        if self.is_recomputing:
            return None
        before = entry.layer if entry.is_summary else entry.layer - 1
        if entry in self._written or (before in self.layout.row and Entry(before) not in self._written):
            raise RuntimeError(
                f"layer {entry.layer} wrote its entry out of order (entries written so far: {len(self._written)})"
            )
        self._written.add(entry)
        return self.entries[self.layout.position[entry]]

    def _visit_once(self, entry: Entry) -> None:
        """Note that backward has reached the operation that made an entry.

        Raises:
            RuntimeError: it had been there before, and the history was not made with ``keep``.
        """
        if entry in self._visited and not self._keep:
            raise RuntimeError(
                "backward can run only once over a layer history, because it overwrites or frees what it reads"
            )
        self._visited.add(entry)

    def _check_kept(self, entries: Sequence[Entry]) -> None:
        """Check that the readers of entries in later parts have been visited, before the entries' gradients go back.

        Raises:
            RuntimeError: some have not.
        """
        for entry in entries:
            later = self.layout.kept_for.get(entry, frozenset())
            if missing := later - self._visited:
                raise RuntimeError(
                    f"the gradient of the entry of layer {entry.layer} lacks what {len(missing)} of its {len(later)} readers in later parts "
                    "of the stage add to it: their backward passes come first"
                )


def separate_view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the first elements of another tensor's memory, with a version counter of its own: autograd does not take
    writes to the rest of that memory for changes of this tensor."""
    return memory.new_empty(0).set_(memory.untyped_storage())[: math.prod(shape)].view(shape)


class BlockTensor:
    """A tensor that the layers of one block share: computed for the first layer that asks, kept until ``drop``."""

    def __init__(self) -> None:
        self._held: tuple[Block, Tensor] | None = None

    def get(self, block: Block, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of ``block``; replaces that of another block."""
        if self._held is None or self._held[0] is not block:
            self._held = (block, compute())
        return self._held[1]

    def drop(self) -> None:
        self._held = None


class OpenWeights(torch.autograd.Function):
    """Stacks the weights of the readers; in backward, after all layers, returns the gradient of each reader's weights."""

    @staticmethod
    def forward(
        ctx: Any, dependency: Tensor, history: LayerHistory, reader_heads: int, *weights: Tensor | None
    ) -> Tensor:
        ctx.history, ctx.part = history, history.part
        ctx.has_weights = [matrix is not None for matrix in weights]
        history.take_weights(reader_heads, weights)
        return torch.zeros_like(dependency)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None, None, *ctx.history.weight_gradients(ctx.part, ctx.has_weights)
