"""Sends and receives of GPU tensors over gloo, through copies in host memory.

gloo reduces and broadcasts GPU tensors, but hands the address of a tensor that is sent or received to the operating system,
which cannot read a GPU's memory. NCCL has no such limit, but refuses two processes on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_off_host(tensor: Tensor) -> bool:
    """Whether a transfer of this tensor needs a copy in host memory."""
    return tensor.device.type != "cpu"


class StagedReceive:
    """A receive into host memory. ``wait`` copies what has arrived to the tensor on the device."""

    def __init__(self, work: Any, host: Tensor, tensor: Tensor) -> None:
        self._work, self._host, self._tensor = work, host, tensor

    def wait(self, *arguments: Any, **options: Any) -> bool:
        finished = bool(self._work.wait(*arguments, **options))
        with torch.no_grad():
            self._tensor.copy_(self._host)
        return finished


def stage_on_host() -> None:
    """Make ``send``, ``recv``, ``isend`` and ``irecv`` of `torch.distributed` copy GPU tensors to and from host memory, from now
    on. For processes whose groups all use gloo."""
    for name in ("send", "isend"):
        setattr(dist, name, _sending(getattr(dist, name)))
    dist.recv, dist.irecv = _receiving(dist.recv), _receiving_later(dist.irecv)


def _sending(send: Callable[..., Any]) -> Callable[..., Any]:
    def staged(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        # The copy waits for the device; the pending transfer keeps it alive.
        return send(tensor.detach().to("cpu", copy=True) if is_off_host(tensor) else tensor, *arguments, **options)

    return staged


def _receiving(receive: Callable[..., Any]) -> Callable[..., Any]:
    def staged(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if not is_off_host(tensor):
            return receive(tensor, *arguments, **options)
        host = torch.empty_like(tensor, device="cpu", requires_grad=False)
        source = receive(host, *arguments, **options)
        with torch.no_grad():
            tensor.copy_(host)
        return source

    return staged


def _receiving_later(receive: Callable[..., Any]) -> Callable[..., Any]:
    def staged(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if not is_off_host(tensor):
            return receive(tensor, *arguments, **options)
        host = torch.empty_like(tensor, device="cpu", requires_grad=False)
        return StagedReceive(receive(host, *arguments, **options), host, tensor)

    return staged
