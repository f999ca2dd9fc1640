"""Where documents begin in the micro-batches of a step, for every stage (``data.document_mask``).

Each stage reads the tokens of its replica itself, also a stage between the first and the last: nothing more crosses a boundary. Stages
read the same micro-batches in the same order, and make the forward passes of their first parts in this order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from lime_dist.model.documents import document_starts

Batches = Iterator[tuple[Tensor, Tensor]]
"""Micro-batches of (tokens, labels), int64 [B, T] each."""


class DocumentStream:
    """Passes micro-batches on to the instructions that load them, and keeps where their documents begin until their forward passes.

    Args:
        batches: the micro-batches of this replica.
        eos: the token that ends every document.
        device: of the stage.
    """

    def __init__(self, batches: Batches, eos: int, device: torch.device) -> None:
        self._batches, self._eos, self._device = batches, eos, device
        self._pending: deque[Tensor] = deque()

    def __iter__(self) -> DocumentStream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = next(self._batches)
        self._pending.append(document_starts(batch[0].to(self._device, non_blocking=True), self._eos))
        return batch

    def take(self) -> Tensor:
        """Starts of documents, [B, T], of the micro-batch whose forward pass is next. A stage without an instruction that loads
        micro-batches reads it here."""
        if not self._pending:
            next(self)
        return self._pending.popleft()
