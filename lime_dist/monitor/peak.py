"""What a device reaches at best: FLOPs a second of a large matrix product."""

from __future__ import annotations

import time

import torch

REPEATS = 5


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of this process's device, in the fastest of some products of square matrices; a multiply-add is 2.

    Processes that share a device's cores measure at the same time, as they will compute at the same time.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
