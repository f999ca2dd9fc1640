"""How fast each device multiplies matrices when all of a host's devices do so at the same time, for a minute or more: a device that
throttles, or a host whose cores something else uses, shows only then."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import torch

from lime_dist.doctor.findings import Finding, Findings

SLOW = 0.1
"""A device is slow if it lacks more than this share of the median speed."""
CPU_SIZE, GPU_SIZE = 512, 8192
"""Rows and columns of the matrices."""


def measure(processes: int, on_gpu: bool, seconds: float) -> list[float]:
    """FLOPs per second of each device of this host, in bfloat16 on GPUs and in float32 on CPUs, in the second half of ``seconds``.

    Args:
        processes: of the job on this host; each uses the GPU of its number, or the cores.
    """
    # A process that has begun to use a GPU cannot be forked.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        devices = [f"cuda:{index}" if on_gpu else "cpu" for index in range(processes)]
        begin = time.time() + 5  # so that all have started by then
        return list(pool.map(_multiply, devices, [begin] * processes, [seconds] * processes))


def _multiply(name: str, begin: float, seconds: float) -> float:
    device = torch.device(name)
    size, dtype = (CPU_SIZE, torch.float32) if device.type == "cpu" else (GPU_SIZE, torch.bfloat16)
    # Random, because a GPU needs less power for numbers that are all the same, and throttles less.
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    time.sleep(max(0.0, begin - time.time()))
    end = time.monotonic() + seconds
    half, products, measured_from = end - seconds / 2, 0, 0.0
    while (now := time.monotonic()) < end or not products:
        if now >= half and not measured_from:
            measured_from = now
        (left @ right)[0, 0].item()  # waits for a GPU
        products += bool(measured_from)
    return 2 * size**3 * products / (time.monotonic() - measured_from)


def check_devices(speeds: Mapping[str, Sequence[float]]) -> Findings:
    """Report the speed of each host's devices, and warn of those that are slower than most.

    Args:
        speeds: FLOPs per second of each device, by host.
    """
    typical = median(speed for devices in speeds.values() for speed in devices)
    slow = [
        (host, index, speed)
        for host, devices in speeds.items()
        for index, speed in enumerate(devices)
        if speed < (1 - SLOW) * typical
    ]
    for host, index, speed in slow:
        yield Finding(
            "warning",
            f"{host}, device {index}: {speed / 1e12:,.2f} TFLOP/s, {1 - speed / typical:.0%} below the median of all; look at its "
            "temperature, clock and power limit, and at what else runs there, or leave the host out",
        )
    for host, devices in speeds.items():
        text = (
            f"{host}: {len(devices)} device(s), {min(devices) / 1e12:,.2f} to {max(devices) / 1e12:,.2f} TFLOP/s each"
        )
        if not any(host == other for other, *_ in slow):
            yield Finding("ok", text)


def to_json(speeds: Sequence[float]) -> str:
    return json.dumps(list(speeds))


def from_json(line: str) -> list[float]:
    """Raises ValueError or TypeError if the line is not what `to_json` makes."""
    return [float(speed) for speed in json.loads(line)]
