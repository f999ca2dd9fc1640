"""A slow cable: carry frames between two TAP devices, with a delay in one direction.

Started by `links.py`, in the network namespace in which it makes the devices; they may be moved to others afterwards.
(The kernel's `tc … netem delay` is a module that many kernels lack, such as those of containers.)
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LARGEST_FRAME = 1 << 16
MOST_FRAMES = 10_000
"""Most frames in transit; more are dropped, as a switch would do."""


def open_tap(name: str) -> int:
    """Make a TAP device. Reading its file gives what the kernel sends through it; what is written there arrives from it."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def carry(slow: int, prompt: int, delay: float) -> None:
    """Carry frames forever: from ``slow`` to ``prompt`` after ``delay`` seconds, the other way at once."""
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([slow, prompt], [], [], patience)
        for end in readable:
            frame = _read(end)
            if end == prompt:
                _write(slow, frame)
            elif len(under_way) < MOST_FRAMES:
                under_way.append((time.monotonic() + delay, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _write(prompt, under_way.popleft()[1])


def _read(end: int) -> bytes:
    try:
        return os.read(end, LARGEST_FRAME)
    except OSError:  # the device is down
        return b""


def _write(end: int, frame: bytes) -> None:
    try:
        os.write(end, frame)
    except OSError:  # the device is down, or this is no frame
        pass


if __name__ == "__main__":
    seconds, *names = sys.argv[1:]
    ends = [open_tap(name) for name in names]
    print("ready", flush=True)
    carry(ends[0], ends[1], float(seconds))
