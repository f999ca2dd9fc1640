"""What ran in a block of code, from the trace of torch's profiler: kernels, waits of the host, and how busy the device was."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check_machine import on_gpu
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
"""Calls in which the host waits for the device."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what runs on a GPU."""


@dataclass(frozen=True)
class Trace:
    """Counts of what ran.

    Attributes:
        launches: kernels, copies and fills on the GPU; without one, operations of torch on the CPU.
        waits: calls in which the host waited for the GPU.
        pageable: copies between the GPU and host memory that is not pinned, for which the host waits as well.
        busy: share of the time from the first to the last kernel in which any ran.
    """

    launches: int
    waits: int
    pageable: int
    busy: float


def traced(work: Callable[[], None]) -> Trace:
    """Run ``work``, which must wait for the device at its end, under the profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=activities) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(errors="replace"))["traceEvents"], on_gpu())


def read_trace(events: Iterable[dict[str, Any]], of_gpu: bool) -> Trace:
    """Count the events of a trace in Chrome's format."""
    complete = [event for event in events if event.get("ph") == "X"]
    if not of_gpu:
        return Trace(sum(event.get("cat") == "cpu_op" for event in complete), 0, 0, 1.0)
    on_device = [event for event in complete if event.get("cat") in ON_DEVICE]
    # `work` ends with a wait of its own, and the profiler adds one.
    last = max((event["ts"] for event in on_device), default=0.0)
    waits = [event for event in complete if event["name"] in WAITS and event["ts"] < last]
    pageable = [event for event in on_device if "ageable" in event["name"]]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in on_device)
    return Trace(len(on_device), len(waits), len(pageable), _covered(spans))


def _covered(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end that sorted spans cover."""
    if not spans:
        return 0.0
    covered, reached = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / (reached - spans[0][0]) if reached > spans[0][0] else 1.0
