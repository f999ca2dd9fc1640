"""A ring of transfers between hosts, one process per host. The sender of each link measures its bandwidth and latency."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

FIRST_BYTES, MOST_BYTES = 1 << 18, 1 << 28
LINK_SECONDS, RING_SECONDS = 1.0, 20.0
"""Time limits for a link and for all links together. Transfers grow until then; the fastest one counts, since the first ones of
a connection are slow."""
SHORTEST_SECONDS = 2e-5
"""A shorter transfer has no rate: it takes no longer than starting it does."""
ECHOES = 5


@dataclass(frozen=True)
class Link:
    """From one host to the next of the ring.

    Attributes:
        bandwidth: bytes per second; 0: all transfers were too short to tell.
        latency: seconds, half of a round trip.
    """

    bandwidth: float
    latency: float


def measure(rank: int, size: int, address: str, port: int, device: str, timeout: float) -> Link:
    """Measure the link from ``rank`` to the next rank. Links take turns; all processes of the ring must call this.

    Args:
        address, port: where the first process listens.
        device: memory to send from; NCCL transfers a GPU's, gloo a CPU's.
        timeout: seconds that one operation may take.
    """
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    link = None
    for sender in range(size):
        receiver = (sender + 1) % size
        if rank == sender:
            link = _send(receiver, where, min(LINK_SECONDS, RING_SECONDS / size))
        elif rank == receiver:
            _receive(sender, where)
        dist.barrier()
    dist.destroy_process_group()
    assert link is not None
    return link


def _send(peer: int, device: torch.device, seconds: float) -> Link:
    """Send larger and larger tensors for ``seconds``; the peer answers each when it has arrived."""
    latency = min(_timed(torch.zeros(1, device=device), peer) for _ in range(ECHOES)) / 2
    count, best, begin = FIRST_BYTES, 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        duration = _timed(torch.zeros(count, dtype=torch.uint8, device=device), peer, announced=True)
        best = max(best, bandwidth(count, duration, latency))
        count = min(MOST_BYTES, 2 * count)
    dist.send(torch.zeros(1, dtype=torch.int64, device=device), peer)
    return Link(best, latency)


def bandwidth(count: int, duration: float, latency: float) -> float:
    """Bytes per second of a transfer and its answer; 0 if it was too short to tell.

    Latency counts for at most half of the duration: a transfer can take no longer than the one with which the latency was
    measured, and would then have any rate.

    Args:
        count: bytes transferred.
        duration: seconds until the answer arrived.
        latency: seconds of one way.
    """
    return 0.0 if duration < SHORTEST_SECONDS else count / max(duration - 2 * latency, duration / 2)


def _timed(tensor: Tensor, peer: int, announced: bool = False) -> float:
    """Seconds from the start of a send until the peer's answer arrives."""
    if announced:
        dist.send(torch.tensor([tensor.nbytes], device=tensor.device), peer)
    answer = torch.zeros(1, device=tensor.device)
    begin = time.perf_counter()
    dist.send(tensor, peer)
    dist.recv(answer, peer)
    answer.item()  # on a GPU, recv returns before the answer has arrived
    return time.perf_counter() - begin


def _receive(peer: int, device: torch.device) -> None:
    answer, count = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(ECHOES):
        dist.recv(answer, peer)
        dist.send(answer, peer)
    while True:
        dist.recv(count, peer)
        if not count.item():
            return
        dist.recv(torch.empty(int(count.item()), dtype=torch.uint8, device=device), peer)
        dist.send(answer, peer)


def to_json(link: Link) -> str:
    return json.dumps(asdict(link))


def from_json(line: str) -> Link:
    """Raises ValueError or TypeError if the line is not what `to_json` makes."""
    return Link(**json.loads(line))
