"""The layer history: the buffer in which the entries of one micro-batch lie on one stage.

Every entry is stored once; layers write their slot and read entries in place, so L layers cost O(L) memory, not the O(L²)
of a fresh concatenation per layer. Who reads what is in `policies.py`, where entries lie in `layout.py`, and the two kinds
of route in `key_value_history.py` and `hidden_history.py`.

Order between writers and readers is explicit: every operation takes a dependency (a scalar of the autograd graph) from the one
before, so that autograd runs them in exactly the reverse order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lime_dist.model.layout import Chunk, StageLayout
from lime_dist.model.policies import Entry


class LayerHistory:
    """What both kinds of route share.

    Use, in this order: construct; ``unpack`` a payload (all stages but the first); ``open``; run the layers, ascending, and
    ``summarise`` each chunk after its last layer; ``release``; ``pack`` a payload (all stages but the last).

    Args:
        lead: elements before the entries in the same memory, where the hidden state of a payload may land.

    Attributes:
        memory: [lead + all entries].
        entries: [positions, *slot_shape]: every entry that this stage holds.
        dependency: the scalar that orders the operations on this history in the autograd graph.
        accumulation_dtype: the precision of sums: that of the entries, at least float32.

    Backward may be walked once; ``keep=True`` costs memory and allows it many times (gradient checkers do that).
    """

    def __init__(
        self,
        layout: StageLayout,
        slot_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
        lead: int = 0,
    ) -> None:
        self.layout, self.slot_shape = layout, slot_shape
        self.memory = torch.empty(lead + layout.num_positions * math.prod(slot_shape), dtype=dtype, device=device)
        self.entries = self.memory[lead:].view(layout.num_positions, *slot_shape)
        self.dependency = torch.zeros((), dtype=dtype, device=device)
        self.accumulation_dtype = torch.promote_types(dtype, torch.float32)
        self.is_recomputing = False
        self._written: set[Entry] = set(layout.received)
        self._keep = keep
        self._visited: set[Entry] = set()

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        """Take the entries of a payload; returns its hidden state [B, T, D]."""
        raise NotImplementedError

    def open(self, routing: Sequence[Tensor | None], summaries: Sequence[Tensor]) -> None:
        """Take the weights of the stage's readers.

        Args:
            routing: by layer, ascending: what it mixes entries with, as far as that is known before it runs.
            summaries: A_m of the chunks that the stage summarises, ascending.
        """
        raise NotImplementedError

    def summarise(self, chunk: Chunk) -> None:
        """Make the summary of a chunk whose last layer has run."""
        raise NotImplementedError

    def release(self) -> list[Tensor]:
        """Hand over what belongs to the autograd graph when the last layer has run, for ``pack``. The graph holds the
        history; a history that held on to the graph would close a circle that Python's collector cannot see, and neither
        would ever be freed."""
        dependency, self.dependency = self.dependency, self.dependency.detach()
        return [dependency]

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        """The payload: the hidden state, then the entries that cross the boundary, [B, T, elements per token]."""
        raise NotImplementedError

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within, layers run again for activation checkpointing: slots are read, never rewritten."""
        self.is_recomputing = True
        try:
            yield
        finally:
            self.is_recomputing = False

    def _claim(self, entry: Entry) -> Tensor | None:
        """The place that an entry is to be written to, once, in turn; None while recomputing.

        Raises:
            RuntimeError: it is not this entry's turn.
        """
        if self.is_recomputing:
            return None
        before = entry.layer if entry.is_summary else entry.layer - 1
        if entry in self._written or (before >= self.layout.start and Entry(before) not in self._written):
            raise RuntimeError(
                f"layer {entry.layer} wrote an entry out of turn: {len(self._written)} entries are there"
            )
        self._written.add(entry)
        return self.entries[self.layout.position[entry]]

    def _visit_once(self, entry: Entry) -> None:
        if entry in self._visited and not self._keep:
            raise RuntimeError(
                "a layer history can be walked backwards once: it gives its memory away while it is walked"
            )
        self._visited.add(entry)


def stranger(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the first elements of another one's memory, with a version counter of its own: autograd does not take
    writes to the rest of that memory for changes of this tensor."""
    return memory.new_empty(0).set_(memory.untyped_storage())[: math.prod(shape)].view(shape)


def add_product(weights: Tensor, matrix: Tensor, total: Tensor | None = None) -> Tensor:
    """total + weights @ matrix, in place and in the precision of ``total``; without one a new tensor like ``matrix``.

    Args:
        weights: [readers · heads, entries · heads].
        matrix: [entries · heads, elements].
    """
    if total is None:
        return weights @ matrix
    if total.dtype == matrix.dtype:
        return total.addmm_(weights, matrix)
    if matrix.is_cuda:  # factors stay in low precision, the product and the sum do not
        return total.add_(torch.mm(weights, matrix, out_dtype=total.dtype))
    return total.addmm_(weights.to(total.dtype), matrix.to(total.dtype))


FEW_ROWS, PIECE = 8, 512
"""`product_of_rows` on a CPU: up to so many rows go as a batch of pieces of so many elements."""


def product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left @ rightᵀ, [rows of left, rows of right], both of few and very long rows: the gradient of weights.

    On a CPU in the order and in the pieces that torch's MKL is fastest with: it is slow when both factors are thin.
    """
    if left.is_cuda:
        return left @ right.t()
    if len(left) > len(right):
        return product_of_rows(right, left).t()
    if len(left) <= FEW_ROWS and left.shape[1] % PIECE == 0:
        pieces = left.view(len(left), -1, PIECE).transpose(0, 1), right.view(len(right), -1, PIECE).permute(1, 2, 0)
        return torch.bmm(*pieces).sum(0)
    return (right @ left.t()).t()
