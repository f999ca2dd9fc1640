"""Histories that wait for their backward pass, in host memory (``parallel.offload_history``).

On an early stage many micro-batches are between their forward and their backward pass, and nothing reads their histories meanwhile. A
history leaves the device after its forward pass, unless one of the next two backward passes is its own, and it comes back while the
backward pass before its own runs. On a stage with five micro-batches in flight (F: forward pass, B: backward pass):

    pass             F0   F1   F2   F3   F4   B0   F5   B1   F6   B2   F7   B3
    on the device    0    0,1  0-2  0-3  0,1  0,1  1,5  1,2  2,6  2,3  3,7  3,4
                                         3,4  4         5         6         7
    comes back                                          2         3         4
    leaves                     2    3    4         5         6         7          after the pass

All copies run on one side stream. A copy to the host begins after its forward pass and overlaps the next pass; then its device memory
is freed. A copy to the device begins after the kernels that used that memory before, and overlaps the backward pass before its own. If a
copy takes longer, the compute stream waits for it. The host never blocks, except in the first steps, which allocate pinned memory. Tensors
and the autograd graph keep their storages, which have no memory meanwhile. A stage with at most `HISTORIES_ON_DEVICE`
micro-batches in flight copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lime_dist.pipeline.memory import HISTORIES_ON_DEVICE


def resize(storage: torch.UntypedStorage, nbytes: int) -> None:
    """Allocate uninitialized memory for a storage; 0 bytes: free its memory."""
    storage.resize_(nbytes)


class _Away:
    """A history that is in host memory, or on its way there or back.

    Attributes:
        memory: all of its elements, without a place in the autograd graph.
        host: a copy of them.
        copied: event after the last copy; None on the CPU.
    """

    def __init__(self, memory: Tensor, host: Tensor) -> None:
        self.memory, self.host = memory, host
        self.copied: Any = None


class WaitingHistories:
    """The histories of a stage. Its engine calls the methods in the order of its passes.

    Args:
        device: of the histories.
    """

    def __init__(self, device: torch.device) -> None:
        self._device_module = torch.get_device_module(device) if device.type != "cpu" else None
        self._stream = self._device_module.Stream(device) if self._device_module is not None else None
        self._unused: list[Tensor] = []  # pinned memory, which is expensive to allocate
        self.begin_step(0)

    def begin_step(self, in_flight: int) -> None:
        """A training step begins.

        Args:
            in_flight: most micro-batches that are between their passes in this step.
        """
        self._moves = in_flight > HISTORIES_ON_DEVICE
        self._backwards = 0
        self._away: dict[int, _Away] = {}
        self._leaving: _Away | None = None

    def after_forward(self, micro_batch: int, memory: Tensor) -> None:
        """A forward pass is over.

        Args:
            memory: all elements of the micro-batch's history, without a place in the autograd graph.
        """
        self._free_what_has_left()
        if self._moves and micro_batch > self._backwards + 1:
            away = _Away(memory, self._host_memory(memory))
            self._copy(away.memory, away.host, away)
            self._away[micro_batch] = self._leaving = away

    def before_backward(self) -> None:
        """The next backward pass begins, that of the oldest micro-batch."""
        if (own := self._away.pop(self._backwards, None)) is not None:
            self._wait_for(own)
        self._backwards += 1
        if (coming := self._away.get(self._backwards)) is not None:
            resize(coming.memory.untyped_storage(), coming.host.nbytes)
            self._copy(coming.host, coming.memory, coming)
            self._unused.append(coming.host)  # the next copy into it follows on the same stream

    def after_backward(self) -> None:
        """A backward pass is over."""
        self._free_what_has_left()

    def _free_what_has_left(self) -> None:
        if self._leaving is not None:
            self._wait_for(self._leaving)
            resize(self._leaving.memory.untyped_storage(), 0)
            self._leaving = None

    def _copy(self, source: Tensor, target: Tensor, away: _Away) -> None:
        """Copy after all kernels that have been queued, in parallel with those that will be."""
        if self._device_module is None:
            target.copy_(source)
            return
        assert self._stream is not None
        self._stream.wait_stream(self._device_module.current_stream())
        with self._device_module.stream(self._stream):
            target.copy_(source, non_blocking=True)
        away.copied = self._stream.record_event()

    def _wait_for(self, away: _Away) -> None:
        """Let the compute stream wait for the last copy."""
        if self._device_module is not None:
            self._device_module.current_stream().wait_event(away.copied)

    def _host_memory(self, memory: Tensor) -> Tensor:
        """Host memory for as many elements, pinned for a GPU."""
        for index, unused in enumerate(self._unused):
            if unused.numel() == memory.numel():
                return self._unused.pop(index)
        return torch.empty(memory.shape, dtype=memory.dtype, pin_memory=self._device_module is not None)
