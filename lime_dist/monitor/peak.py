"""The peak speed of a device, measured by a large matrix product."""

from __future__ import annotations

import time

import torch

REPEATS = 5
"""Number of matrix products, of which the fastest counts."""


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of this process's device in the fastest of `REPEATS` products of square matrices.

    A multiply-add counts as 2 FLOPs. Processes that share the cores of a machine measure at the same time, because they also
    compute at the same time.
    """
    size = 512 if device.type == "cpu" else 8192
    left, right = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        (left @ right)[0, 0].item()  # .item() waits for the GPU
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
