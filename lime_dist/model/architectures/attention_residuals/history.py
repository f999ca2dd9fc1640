"""The history of attention residuals: the outputs of finished blocks, which every sub-layer reads with a softmax over depth.

The hidden state between layers is the running sum of the block that is not finished; it crosses a stage boundary beside the finished
blocks. A block that is finished is written once and read in place: L layers take O(L) memory. A read keeps its mixture and the
logarithm of its sum of exponentials.

What a group of sub-layers (`Blocks.group`) reads of the blocks that are older than the group is one product for all of them, and so
are its gradients. To this mixture each sub-layer adds what has been finished since, and the running sum, as in the online softmax:
mixtures a and b with the logarithms s and t of their sums of exponentials are together (eˢ·a + eᵗ·b) / (eˢ + eᵗ).

Gradients of finished blocks are summed in a buffer of the same size, in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lime_dist.model.architectures.attention_residuals.blocks import Blocks
from lime_dist.model.architectures.attention_residuals.depth_softmax import inverse_rms, mix, spread, total_weights
from lime_dist.model.architectures.attention_residuals.functions import Pack, Read, TakeQueries, Unpack, Write
from lime_dist.model.crossing import Crossing
from lime_dist.model.history import LayerHistory, separate_view
from lime_dist.model.layout import StageLayout
from lime_dist.model.mean_weights import MeanWeights, remainder


class DepthHistory(LayerHistory):
    """The history of one micro-batch on one stage. An entry is [N, D]; its position is the number of its block.

    Attributes:
        inverse_EN: 1 / rms of every entry.
        query_gradients: by part, [readers, D], complete when all of its readers have been visited.
    """

    def __init__(
        self,
        layout: StageLayout,
        blocks: Blocks,
        num_tokens: int,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        lead: int = 0,
    ) -> None:
        accumulation_dtype = torch.promote_types(dtype, torch.float32)
        self.layout, self.blocks, self.eps = layout, blocks, eps
        self.is_recomputing = False
        self.slot_shape, self.accumulation_dtype = (num_tokens, hidden_size), accumulation_dtype
        num_blocks = len(layout.incoming.entries)
        num_blocks += sum(blocks.begins(j) for part in layout.parts for j in range(2 * part.start, 2 * part.stop))
        self.memory = torch.empty(lead + num_blocks * num_tokens * hidden_size, dtype=dtype, device=device)
        self.entries = self.memory[lead:].view(num_blocks, *self.slot_shape)
        self.dependency = torch.zeros((), dtype=dtype, device=device)
        self.inverse_EN = self.entries.new_empty(self.entries.shape[:2], dtype=accumulation_dtype)
        self.query_gradients: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._end = 2 * layout.num_layers  # the last read
        self._older: tuple[range, Tensor, Tensor] | None = None
        self._visited_group: tuple[range, Tensor, Tensor, Tensor] | None = None
        self._gradients: Tensor | None = None
        self._score_products: Tensor | None = None
        self._num_written = len(layout.received[0].entries)
        self._last_visited = self._end + 1
        self._visited_parts: set[int] = set()

    # -- called by the stage and its layers ---------------------------------------------------------------------------

    def landing(self, shape_BTC: tuple[int, ...]) -> Tensor:
        return separate_view(self.memory, shape_BTC)

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        running_BTD, self.dependency = Unpack.apply(payload_BTC, hidden_size, self)
        return running_BTD

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        return Pack.apply(*released, hidden_BTD, self)

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Take the queries of the stage's layers, [readers of the layer, D] each."""
        queries = [query for query in routing if query is not None]
        self.dependency = TakeQueries.apply(self.dependency, self, *queries)

    def release(self) -> list[Tensor]:
        (dependency,) = super().release()
        # Where a block begins, a read has no other input that needs a gradient, and a recomputed layer must keep what it did.
        self.dependency.requires_grad_(dependency.requires_grad)
        return [dependency]

    def read(self, sublayer: int, running_BTD: Tensor) -> Tensor:
        """The input of a sub-layer, [B, T, D], before its norm. If a block begins with it, the last one is written first.

        Args:
            running_BTD: the sum of the outputs of the last block's sub-layers so far.
        """
        running_ND: Tensor | None = running_BTD.flatten(0, 1)
        if self.blocks.begins(sublayer) and sublayer < self._end:
            self._advance(Write.apply(self.dependency, running_ND, self, sublayer))
            running_ND = None
        if sublayer == 0:
            return running_BTD
        mixture_ND, dependency = Read.apply(self.dependency, running_ND, self, sublayer)
        self._advance(dependency)
        return mixture_ND.view_as(running_BTD)

    # -- called by autograd Functions in forward ----------------------------------------------------------------------

    def take_queries(self, queries_RD: Tensor) -> None:
        self._queries[self.part] = queries_RD.to(self.accumulation_dtype)
        self.query_gradients[self.part] = torch.zeros_like(self._queries[self.part])

    def take_received(self, received_END: Tensor | None) -> None:
        """Copy the blocks that a part receives to their places; None: they are there."""
        places = self.places_of(self.layout.received[self.part])
        if received_END is not None:
            self.entries[places].copy_(received_END)
        for position in range(places.start, places.stop):
            self.inverse_EN[position] = inverse_rms(self.entries[position], self.eps)
        self._num_written = max(self._num_written, places.stop)

    def write_block(self, sublayer: int, finished_ND: Tensor) -> None:
        """Write the output of the block before the one that begins with a sub-layer; does nothing while recomputing.

        Raises:
            RuntimeError: it is not this block's turn.
        """
        if self.is_recomputing:
            return
        position = self._position(sublayer)
        if position != self._num_written:
            raise RuntimeError(f"sub-layer {sublayer} wrote block {position} after {self._num_written} blocks")
        self._num_written += 1
        self.entries[position].copy_(finished_ND)
        self.inverse_EN[position] = inverse_rms(finished_ND, self.eps)

    def mixture(self, sublayer: int, running_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mixture of a reader [N, D], and the logarithm of its sum of exponentials [N]."""
        readers = self._readers(sublayer)
        older, finished = self._num_older(readers), self._num_finished(sublayer)
        # 1. What the whole group reads of older blocks: one product, computed for the group's first reader.
        if self._older is None or self._older[0] != readers:
            self._older = readers, *mix(self.entries[:older], self.inverse_EN[:older], self._queries_of(readers))
        _, mixtures_RND, sums_RN = self._older
        parts = [(mixtures_RND[sublayer - readers.start], sums_RN[sublayer - readers.start])]
        # 2. What has been finished since.
        alone = range(sublayer, sublayer + 1)
        if finished > older:
            mixtures, sums = mix(self.entries[older:finished], self.inverse_EN[older:finished], self._queries_of(alone))
            parts.append((mixtures[0], sums[0]))
        # 3. The running sum.
        if running_ND is not None:
            wide_ND = running_ND.to(self.accumulation_dtype)
            scores_N = (wide_ND @ self._queries_of(alone)[0]).mul_(inverse_rms(running_ND, self.eps))
            parts.append((wide_ND, scores_N))
        # 4. Forget the group's mixtures after its last reader. A recomputed layer keeps them for those before it.
        if not self.is_recomputing and sublayer == readers[-1]:
            self._older = None
        mixture_ND, sums_N = _merged(parts)
        if self.mean_weights is not None:
            self._add_weights(self.mean_weights, sublayer, running_ND is not None, sums_N)
        return mixture_ND.to(self.entries.dtype), sums_N

    # -- called by autograd Functions in backward ---------------------------------------------------------------------

    def take_sent_gradient(self, part: int, gradient_END: Tensor) -> None:
        """Add the gradients that come back for the blocks that a part has sent.

        Raises:
            RuntimeError: the backward pass of a later part of the stage has not been here.
        """
        self._check_later(part)
        if self._gradients is None and len(gradient_END) == len(self.entries):
            self._gradients = gradient_END.to(self.accumulation_dtype, copy=True)
        else:
            self.gradients[self.places_of(self.layout.sent[part])] += gradient_END

    @property
    def gradients(self) -> Tensor:
        """[positions, N, D] in ``accumulation_dtype``: the sum over the readers visited so far."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.entries, dtype=self.accumulation_dtype)
        return self._gradients

    @property
    def score_products(self) -> Tensor:
        """[positions, N]: the sum of the scores times their gradients, over the readers visited so far."""
        if self._score_products is None:
            self._score_products = torch.zeros_like(self.inverse_EN)
        return self._score_products

    def visit(
        self, sublayer: int, running_ND: Tensor | None, mixture_ND: Tensor, sums_N: Tensor, gradient_ND: Tensor
    ) -> Tensor | None:
        """Add to the gradients of all blocks that a reader reads; returns the gradient of the running sum.

        Raises:
            RuntimeError: backward has been here before.
        """
        if sublayer >= self._last_visited:
            raise RuntimeError("backward can run only once over a layer history, because it adds to the same gradients")
        self._last_visited = sublayer
        if sublayer == self._first_of(self._part_of(sublayer)):
            self._visited_parts.add(self._part_of(sublayer))
        readers, dtype = self._readers(sublayer), self.accumulation_dtype
        older, finished = self._num_older(readers), self._num_finished(sublayer)
        wide_ND = gradient_ND.to(dtype)
        products_N = (wide_ND * mixture_ND).sum(-1)
        running_gradient = None
        if running_ND is not None:
            running_gradient = self._running_gradient(sublayer, running_ND, sums_N, wide_ND, products_N)
        if finished > older:
            self._spread(
                range(sublayer, sublayer + 1), slice(older, finished), sums_N[None], gradient_ND[None], products_N[None]
            )
        # What the group reads together waits for its first reader, the last one in backward.
        if self._visited_group is None:
            shape_RN = (len(readers), len(sums_N))
            self._visited_group = (
                readers, sums_N.new_empty(shape_RN), gradient_ND.new_empty(*shape_RN, gradient_ND.shape[-1]),
                sums_N.new_empty(shape_RN),
            )  # fmt: skip
        _, *kept = self._visited_group
        for whole, own in zip(kept, (sums_N, gradient_ND, products_N), strict=True):
            whole[sublayer - readers.start] = own
        if sublayer == readers[0]:
            self._older = self._visited_group = None
            self._spread(readers, slice(0, older), *kept)
        return running_gradient

    def block_gradient(self, sublayer: int) -> Tensor:
        """[N, D]: the gradient of the block that was written before a sub-layer, once all of its readers are visited."""
        return self._finished_gradient(self._position(sublayer)).to(self.entries.dtype)

    def received_gradient(self, part: int, out_END: Tensor) -> None:
        """Write the gradients to send back over the boundary before a part, once all of its layers have been visited.

        Raises:
            RuntimeError: the backward pass of a later part of the stage has not been here.
        """
        self._check_later(part)
        places = self.places_of(self.layout.received[part])
        for position, out_ND in zip(range(places.start, places.stop), out_END, strict=True):
            out_ND.copy_(self._finished_gradient(position))

    # -- places and readers -------------------------------------------------------------------------------------------

    def places_of(self, crossing: Crossing) -> slice:
        """The positions of the blocks that cross a boundary; they are consecutive."""
        if not crossing.entries:
            return slice(0, 0)
        first = crossing.entries[0]
        begin = self._position(2 * first.layer + first.row)
        return slice(begin, begin + len(crossing.entries))

    def _check_later(self, part: int) -> None:
        missing = [later for later in range(part + 1, len(self.layout.parts)) if later not in self._visited_parts]
        if missing:
            raise RuntimeError(f"part {part} of the stage: its blocks lack the gradients of {len(missing)} later parts")

    def _part_of(self, sublayer: int) -> int:
        return self.layout.part_of_layer(min(sublayer, self._end - 1) // 2)

    def _first_of(self, part: int) -> int:
        """The first reader of a part; sub-layer 0 has nothing to choose from."""
        return max(1, 2 * self.layout.parts[part].start)

    def _add_weights(self, means: MeanWeights, sublayer: int, has_running: bool, sums_N: Tensor) -> None:
        """Add a reader's weights, [1, blocks], given the logarithms of its sums of exponentials; the running sum has what is left."""
        alone, finished = range(sublayer, sublayer + 1), self._num_finished(sublayer)
        of_blocks = total_weights(
            self.entries[:finished], self.inverse_EN[:finished], self._queries_of(alone), sums_N[None]
        )
        running = remainder(of_blocks, len(sums_N))
        layer = min(sublayer, self._end - 1) // 2
        totals = torch.cat([of_blocks, running], 1) if has_running else of_blocks
        means.add(layer, totals, len(sums_N), first=sublayer - 2 * layer)

    def _position(self, sublayer: int) -> int:
        """Of the block that is finished when a block begins with this sub-layer."""
        return self.blocks.finished(sublayer) - 1

    def _num_finished(self, sublayer: int) -> int:
        return self.blocks.finished(min(sublayer, self._end - 1))

    def _readers(self, sublayer: int) -> range:
        """The readers on this stage that share a product with this one. The last read joins the last sub-layer."""
        group = self.blocks.group(min(sublayer, self._end - 1))
        part = self._part_of(sublayer)
        stop = min(group.stop, 2 * self.layout.parts[part].stop)
        return range(max(group.start, self._first_of(part)), stop + (stop == self._end))

    def _num_older(self, readers: range) -> int:
        return self._num_finished(readers.start)

    def _queries_of(self, readers: range) -> Tensor:
        return self._queries[self._part_of(readers.start)][self._rows_of(readers)]

    def _rows_of(self, readers: range) -> slice:
        """Of readers of one part, among its queries."""
        first = self._first_of(self._part_of(readers.start))
        return slice(readers.start - first, readers.stop - first)

    def _spread(
        self, readers: range, places: slice, sums_RN: Tensor, gradient_RND: Tensor, products_RN: Tensor
    ) -> None:
        """Add to the gradients of some blocks, and of the queries, what readers read of them."""
        query_gradients = self.query_gradients[self._part_of(readers.start)][self._rows_of(readers)]
        spread(
            self.entries[places], self.inverse_EN[places], self._queries_of(readers), sums_RN, gradient_RND, products_RN,
            self.gradients[places], self.score_products[places], query_gradients,
        )  # fmt: skip

    def _running_gradient(
        self, sublayer: int, running_ND: Tensor, sums_N: Tensor, gradient_ND: Tensor, products_N: Tensor
    ) -> Tensor:
        """The gradient of the running sum that a reader read; adds to that of the reader's query."""
        alone = range(sublayer, sublayer + 1)
        (query_D,), wide_ND = self._queries_of(alone), running_ND.to(self.accumulation_dtype)
        inverse_N = inverse_rms(running_ND, self.eps)
        scores_N = (wide_ND @ query_D).mul_(inverse_N)
        weights_N = (scores_N - sums_N).exp_()
        score_gradients_N = weights_N * ((gradient_ND * wide_ND).sum(-1) - products_N)
        scaled_N = score_gradients_N * inverse_N
        self.query_gradients[self._part_of(sublayer)][self._rows_of(alone)] += wide_ND.t() @ scaled_N
        total_ND = gradient_ND * weights_N.unsqueeze(-1)
        total_ND.addcmul_(scaled_N.unsqueeze(-1), query_D)
        norm_N = score_gradients_N.mul_(scores_N).mul_(inverse_N.square_()).div_(wide_ND.shape[-1])
        return total_ND.addcmul_(norm_N.unsqueeze(-1), wide_ND, value=-1).to(running_ND.dtype)

    def _finished_gradient(self, position: int) -> Tensor:
        """The gradient of an entry through its values and its keys, [N, D]. It has memory of its own: a weight pass keeps it, and must
        not keep the buffer."""
        factor_N = self.score_products[position] * self.inverse_EN[position].square() / self.slot_shape[1]
        entry_ND = self.entries[position].to(self.accumulation_dtype)
        return self.gradients[position].addcmul(factor_N.unsqueeze(-1), entry_ND, value=-1)


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mixtures [N, D] with the logarithms of their sums of exponentials [N] as one."""
    if len(parts) == 1:  # rows of the group's mixtures, which would be kept as a whole
        return parts[0][0].clone(), parts[0][1].clone()
    sums_N = torch.stack([sums for _, sums in parts]).logsumexp(0)
    (first_ND, first_N), *others = parts
    mixture_ND = first_ND * (first_N - sums_N).exp_().unsqueeze(-1)
    for other_ND, other_N in others:
        mixture_ND.addcmul_(other_ND, (other_N - sums_N).exp_().unsqueeze(-1))
    return mixture_ND, sums_N
