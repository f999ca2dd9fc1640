"""Measure one training step of a model: its seconds, and its peak of live tensor bytes.

A step is forward, loss and backward. The peak includes parameters, inputs, gradients, activations and whatever else torch
allocates. On the CPU, the storage that an operation returns counts until it is freed; what an operation
allocates and frees internally is not counted, nor what the allocator caches.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lime_dist.model.decoder import Decoder
from lime_dist.model.layers import language_model_loss


@dataclass(frozen=True)
class Subject:
    """A decoder, and the function from tokens [B, T] to its logits [B, T, V]."""

    decoder: Decoder
    logits: Callable[[Tensor], Tensor]

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Run forward, loss and backward; ``batch`` holds tokens and labels."""
        tokens_BT, labels_BT = batch
        language_model_loss(self.logits(tokens_BT), labels_BT).backward()

    def drop_gradients(self) -> None:
        self.decoder.zero_grad(set_to_none=True)


def step_seconds(subject: Subject, batch: tuple[Tensor, Tensor]) -> float:
    """Return the seconds of one step. Gradients are dropped after the clock has stopped."""
    device = batch[0].device
    _synchronise(device)
    begin = time.perf_counter()
    subject.step(batch)
    _synchronise(device)
    taken = time.perf_counter() - begin
    subject.drop_gradients()
    return taken


def step_peak_bytes(subject: Subject, batch: tuple[Tensor, Tensor]) -> int:
    """Return the peak of live bytes during one step. On CUDA, an earlier step lets libraries
    allocate what they keep; that memory is not counted."""
    gc.collect()
    device = batch[0].device
    before = [*subject.decoder.parameters(), *batch]
    if device.type == "cpu":
        with LiveBytes() as count:
            for tensor in before:
                count.add(tensor)
            subject.step(batch)
        subject.drop_gradients()
        return count.peak
    step_seconds(subject, batch)
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - sum(tensor.nbytes for tensor in before)
    step_seconds(subject, batch)
    return torch.cuda.max_memory_allocated(device) - others


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages while it is active.

    Attributes:
        live: bytes that are alive now.
        peak: the largest ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once for all its views."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._counted:
            return
        self._counted.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size).atexit = False

    def _drop(self, address: int, size: int) -> None:
        self._counted.remove(address)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result
