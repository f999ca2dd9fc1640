"""The history of ``depth_attention: moda``: keys and values of earlier layers, to which attention attends beside the sequence's.

Attention of layer ℓ is one softmax over the keys of its own layer, at all tokens so far, and over the keys that earlier layers have
at the query's token. A slot has the rotated keys and the values of a layer, and with ``mlp_entries`` a second pair, from the input
of its MLP. At one token, rotations of query and key cancel.

Slots are written once and read in place, by the attention of their own layer as well: attention keeps no keys and values. The part
of the sequence is a kernel of torch, that of earlier layers a small product for every token and K/V head; `softmax.mix` merges them.
Backward computes scores again. It visits layers from last to first, and each adds to the gradients of what it read, in a buffer in at
least float32. What the layers of a block all read is one product for the block. A chunk's summary is a sum of its slots with weights
A_m, the same for keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lime_dist.model.architectures.lime.depth.functions import Attend, Summarise, WriteMlp
from lime_dist.model.architectures.lime.depth.kernels import Attended, attend, gradients
from lime_dist.model.architectures.lime.depth.softmax import Together, mix, spread, total_shares
from lime_dist.model.architectures.lime.kv.functions import Pack, Unpack
from lime_dist.model.chunks import Chunk
from lime_dist.model.history import LayerHistory, separate_view
from lime_dist.model.layout import StageLayout
from lime_dist.model.mean_weights import MeanWeights, remainder
from lime_dist.model.places import Block
from lime_dist.model.policies import Entry
from lime_dist.model.products import add_product, product_of_rows


class DepthKeyValueHistory(LayerHistory):
    """The history of one micro-batch on one stage. A slot is [pairs, 2, N, G, d]: rotated keys, and values, of attention, and of
    the MLP if ``pairs`` is 2."""

    def __init__(
        self,
        layout: StageLayout,
        pairs: int,
        num_heads: int,
        head_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        lead: int = 0,
    ) -> None:
        super().__init__(layout, (pairs, 2, num_tokens, num_heads, head_size), 1, dtype, device, dtype, lead=lead)
        self._gradients: Tensor | None = None
        self._summary_weights: dict[int, Tensor] = {}
        self._together: Together | None = None

    # -- called by the stage and its layers ---------------------------------------------------------------------------

    def landing(self, shape_BTC: tuple[int, ...]) -> Tensor:
        return separate_view(self.memory, shape_BTC)

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        hidden, self.dependency = Unpack.apply(payload_BTC, hidden_size, self)
        return hidden

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        return Pack.apply(*released, hidden_BTD, self)

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        """Take A_m [rows, chunk size] of the part's chunks; layers have no weights."""
        chunks = self.layout.chunks_of(self.part)
        self._summary_weights = {chunk.index: weights for chunk, weights in zip(chunks, others, strict=True)}

    def release(self) -> list[Tensor]:
        self._summary_weights = {}
        return super().release()

    def attend(self, layer: int, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None = None) -> Tensor:
        """Write a layer's rotated keys and its values, and attend; returns [B, T, H, d].

        Args:
            mask: added to the scores of the sequence, [B, 1, T, T]; None: a query reads all keys up to its own.
        """
        out_BTHd, dependency = Attend.apply(self.dependency, q_BHTd, k_BGTd, v_BGTd, mask, self, layer)
        self._advance(dependency)
        return out_BTHd

    def write_mlp(self, layer: int, k_BGTd: Tensor, v_BGTd: Tensor) -> None:
        """Write the rotated keys and the values of a layer's MLP, for later layers."""
        self._advance(WriteMlp.apply(self.dependency, k_BGTd, v_BGTd, self, layer))

    def summarise(self, chunk: Chunk) -> None:
        self._advance(Summarise.apply(self.dependency, self._summary_weights[chunk.index], self, chunk))

    # -- called by autograd Functions in forward ----------------------------------------------------------------------

    def take_received(self, entries: Tensor) -> None:
        """Copy the entries that a part receives to their places."""
        self._received(self.entries, self.part).copy_(entries)

    def write_slot(self, layer: int, k_BGTd: Tensor, v_BGTd: Tensor) -> None:
        """Write keys and values of a layer's attention; does nothing while recomputing."""
        slot = self._claim(Entry(layer))
        if slot is not None:
            self._write_pair(slot[0], k_BGTd, v_BGTd)

    def write_mlp_pair(self, layer: int, k_BGTd: Tensor, v_BGTd: Tensor) -> None:
        """Write keys and values of a layer's MLP; does nothing while recomputing."""
        if not self.is_recomputing:
            self._write_pair(self.entries[self.layout.slot(layer)][1], k_BGTd, v_BGTd)

    def attended(self, layer: int, q_BHTd: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Output [B, T, H, d], logarithms of the sums of exponentials [B, T, H], and the state of the kernel."""
        out_BHTd, sums_BHT, state = attend(q_BHTd, *self._own(layer, len(q_BHTd)), mask)
        out_BTHd, sums_BTH = (x.transpose(1, 2).contiguous() for x in (out_BHTd, sums_BHT))
        if runs := self._older(layer) + self._alone(layer):
            out_NGRd = self._by_group(out_BTHd)
            pairs, q_NGRd, sums_NGR = (
                self._pairs(self.entries, runs), self._by_group(q_BHTd.transpose(1, 2)), sums_BTH.view(out_NGRd.shape[:3])
            )  # fmt: skip
            mix(pairs, q_NGRd, out_NGRd, sums_NGR)
            if self.mean_weights is not None:
                self._add_shares(self.mean_weights, layer, runs, total_shares(pairs, q_NGRd, sums_NGR))
        return out_BTHd, sums_BTH, state

    def write_summary(self, chunk: Chunk, weights: Tensor) -> None:
        """Write U_m = A_m·[slots of the chunk] to its rows' places."""
        for row in chunk.rows:
            self._claim(row)
        (place,) = self.layout.places(chunk.rows).runs
        total = self._flat(self.entries, place).zero_()
        for columns, run in self._sources(chunk):
            add_product(weights[:, columns], self._flat(self.entries, run), total)

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """[entries sent, *slot]."""
        return len(self.layout.sent[self.part]), *self.slot_shape

    def write_sent(self, target: Tensor) -> None:
        """Write the entries that cross the next boundary into ``target``."""
        for index, entry in enumerate(self.layout.sent[self.part].entries):
            target[index].copy_(self.entries[self.layout.position[entry]])

    # -- called by autograd Functions in backward ---------------------------------------------------------------------

    @property
    def gradients(self) -> Tensor:
        """[positions, *slot] in ``accumulation_dtype``: the sum over the readers visited so far."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.entries, dtype=self.accumulation_dtype)
        return self._gradients

    def take_sent_gradient(self, part: int, gradient: Tensor) -> None:
        """Add the gradients that come back for the entries that a part has sent."""
        for index, entry in enumerate(self.layout.sent[part].entries):
            self.gradients[self.layout.position[entry]] += gradient[index]

    def visit(
        self,
        layer: int,
        q_BHTd: Tensor,
        out_BTHd: Tensor,
        sums_BTH: Tensor,
        mask: Tensor | None,
        state: Any,
        gradient_BTHd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add to the gradients of what a layer read of earlier layers; returns those of its queries, keys and values."""
        self._visit_once(Entry(layer))
        self._check_kept([Entry(layer)])
        batch, layout = len(q_BHTd), self.layout
        gradient_BTHd = gradient_BTHd.contiguous()
        attended = Attended(out_BTHd.transpose(1, 2), sums_BTH.transpose(1, 2), state)
        query, key, value = gradients(gradient_BTHd.transpose(1, 2), q_BHTd, *self._own(layer, batch), attended, mask)
        query_BTHd = query.transpose(1, 2).contiguous()
        older, alone, block = self._older(layer), self._alone(layer), layout.blocks[layer]
        if older or alone:
            q_NGRd, gradient_NGRd = self._by_group(q_BHTd.transpose(1, 2)), self._by_group(gradient_BTHd)
            products_BTH = (gradient_BTHd.to(sums_BTH.dtype) * out_BTHd).sum(-1)
            shape = q_NGRd.shape[:3]
            rest = (q_NGRd, sums_BTH.view(shape), gradient_NGRd, products_BTH.view(shape), self._by_group(query_BTHd))
            if alone:
                spread(self._pairs(self.entries, alone), self._pairs(self.gradients, alone), *rest)
            if older:
                pairs, reader = self._pairs(self.entries, older), layer - block.layers[0]
                if self._together is None:
                    self._together = Together(len(block.layers), sum(map(len, pairs)), q_NGRd)
                spread(pairs, [], *rest, (self._together, reader))
                self._together.take(reader, q_NGRd, gradient_NGRd)
        if layer == block.layers[0] and self._together is not None:
            together, self._together = self._together, None
            together.spread(self._pairs(self.gradients, self._older(layer)))
        own = self._gradients_of(layer, 0, batch)
        if own is not None:
            key, value = (part + more for part, more in zip((key, value), own, strict=True))
        return query_BTHd.transpose(1, 2), key.to(q_BHTd.dtype), value.to(q_BHTd.dtype)

    def mlp_gradients(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values of a layer's MLP, once all of their readers are visited. They are copies: a weight pass keeps
        them, and must not keep the buffer."""
        own = self._gradients_of(layer, 1, batch)
        assert own is not None
        key, value = (part.to(self.entries.dtype, copy=True) for part in own)
        return key, value

    def visit_summary(self, chunk: Chunk, weights: Tensor) -> Tensor:
        """Give the gradient of U_m to the chunk's slots; returns that of A_m."""
        for row in chunk.rows:
            self._visit_once(row)
        self._check_kept(chunk.rows)
        (place,) = self.layout.places(chunk.rows).runs
        gradient, of_weights = self._flat(self.gradients, place), torch.empty_like(weights)
        narrow = gradient.to(self.entries.dtype)
        for columns, run in self._sources(chunk):
            of_weights[:, columns] = product_of_rows(narrow, self._flat(self.entries, run))
            self._flat(self.gradients, run).addmm_(weights[:, columns].to(gradient.dtype).t(), gradient)
        return of_weights

    def received_gradient(self, part: int, out: Tensor) -> None:
        """Write the gradients to send back over the boundary before a part, once all of its layers have been visited."""
        self._check_kept(self.layout.received[part].entries)
        if len(out):
            out.copy_(self._received(self.gradients, part))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _received(self, buffer: Tensor, part: int) -> Tensor:
        """The places of the entries that a part receives."""
        begin = sum(map(len, self.layout.received[:part]))
        return buffer[begin : begin + len(self.layout.received[part])]

    def _older(self, layer: int) -> list[slice]:
        """Positions of what all layers of a layer's block read, in runs."""
        block: Block = self.layout.blocks[layer]
        return list(block.older.runs)

    def _alone(self, layer: int) -> list[slice]:
        """Positions of what else a layer reads of earlier layers, in runs."""
        own, layout = self.layout.slot(layer), self.layout
        entries = (
            entry for entry in layout.reads[layer] if layout.position[entry] not in layout.blocks[layer].older.positions
        )
        return list(layout.places(entry for entry in entries if layout.position[entry] != own).runs)

    def _add_shares(self, means: MeanWeights, layer: int, runs: Sequence[slice], of_columns: Tensor) -> None:
        """Add a layer's shares of attention, [H, entries read]; the own slot has that of the sequence.

        Args:
            of_columns: sums over tokens [H, columns of the runs].
        """
        num_tokens, own = self.slot_shape[2], self.layout.slot(layer)
        of_entries = of_columns.unflatten(1, (-1, self.slot_shape[0])).sum(-1)
        column = {
            position: index for index, position in enumerate(chain(*(range(run.start, run.stop) for run in runs)))
        }
        read = [self.layout.position[entry] for entry in self.layout.reads[layer]]
        totals = torch.zeros(len(of_entries), len(read), dtype=of_entries.dtype, device=of_entries.device)
        sequence = remainder(of_entries, num_tokens)[:, 0]
        for index, position in enumerate(read):
            totals[:, index] = sequence if position == own else of_entries[:, column[position]]
        means.add(layer, totals, num_tokens)

    def _pairs(self, buffer: Tensor, runs: Sequence[slice]) -> list[Tensor]:
        """Pairs of keys and values in runs of positions, [C, 2, N, G, d] each."""
        return [buffer[run].flatten(0, 1) for run in runs]

    def _own(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's attention, [B, G, T, d] each, in the memory of the history."""
        pair = self.entries[self.layout.slot(layer)][0].unflatten(1, (batch, -1))
        key, value = pair.transpose(2, 3).unbind()
        return key, value

    def _gradients_of(self, layer: int, pair: int, batch: int) -> tuple[Tensor, Tensor] | None:
        """What later readers gave to the gradients of a layer's keys and values, [B, G, T, d] each; None: there is no reader."""
        if self._gradients is None:
            return None
        both = self._gradients[self.layout.slot(layer)][pair].unflatten(1, (batch, -1))
        key, value = both.transpose(2, 3).unbind()
        return key, value

    def _by_group(self, x_BTHd: Tensor) -> Tensor:
        """[B, T, H, d] -> [N, G, R, d]."""
        return x_BTHd.flatten(0, 1).unflatten(1, (self.slot_shape[3], -1))

    def _write_pair(self, place_2NGd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> None:
        for place_NGd, x_BGTd in zip(place_2NGd, (k_BGTd, v_BGTd), strict=True):
            x_BTGd = x_BGTd.transpose(1, 2)
            place_NGd.view(x_BTGd.shape).copy_(x_BTGd)

    def _sources(self, chunk: Chunk) -> list[tuple[slice, slice]]:
        """The slots of a chunk in runs: columns of the weights of its summary, and positions."""
        part = self.layout.part_of[chunk.rows[0]]
        readers = self.layout.readers_by_part[part][len(self.layout.parts[part]) :]
        return readers[self.layout.chunks_of(part).index(chunk)].weight_columns
