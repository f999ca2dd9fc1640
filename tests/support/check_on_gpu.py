"""Worker cases: sections of benchmarks/gpu_check.py, and transfers over gloo, on the fake GPU, which stands for CUDA."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.fake_gpu import DEVICE, FakeGpu, playing
from support.transfers import build

from benchmarks.equality import rank_batches
from lime_dist.host_staging import stage_on_host

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_sections(folder: str) -> dict[str, Any]:
    """Measure memory and cluster configurations as on a GPU; train as the sections do that compare, also as one of two stages over
    host memory. Returns the reports' rows, problems, and the devices of the results."""
    sys.path.insert(0, str(BENCHMARKS))
    import equality
    import gpu_check_cluster
    import gpu_check_engine
    import gpu_check_memory
    from gpu_check_errors import EVALUATION_MICRO_BATCH_SIZE
    from gpu_check_machine import SMALL
    from gpu_check_models import compared
    from gpu_check_report import Report
    from gpu_check_trace import Trace
    from gpu_check_worker import on_cpu

    sizes = replace(SMALL, models=["lime chunked"], cluster_micro_batches=1, steps=1)
    gpu_check_cluster.WARM_UP = 1
    path = gpu_check_cluster.CONFIGS / "lime_64_2x8.yaml"
    gpu_check_cluster.CONFIGS = Path(folder)
    (Path(folder) / path.name).write_text(path.read_text())
    os.environ["DS_ACCELERATOR"] = "cuda"
    for module in (gpu_check_memory, gpu_check_cluster):
        module.start_processes = lambda: None
    gpu_check_cluster.device = lambda: torch.device(DEVICE)
    gpu_check_cluster.measured_flops = lambda device, dtype: 1e12
    gpu_check_cluster.traced = lambda work: Trace(
        launches=1, waits=0, pageable=0, busy=1.0
    )  # a profiler sees no fake GPU
    reports = {}
    with playing(0, 1) as gpu:
        stand_in(gpu)
        for name, module in {"memory": gpu_check_memory, "cluster": gpu_check_cluster}.items():
            report = Report(Path(folder) / f"{name}.json", {})
            module.measure(report, sizes)
            reports[name] = (report.rows, report.problems)
        with gpu_check_engine.trainer(compared("lime chunked", SMALL.equality)) as run:
            result = equality.train_stage(run.engine, run.optimizer, run.config, 1, EVALUATION_MICRO_BATCH_SIZE)
        made = {tensor.device.type for tensor in result["gradients"].values()}
        kept = {tensor.device.type for tensor in on_cpu(result)["gradients"].values()}
    return {**reports, "made": made, "kept": kept}


def transfers_over_gloo(values: dict[str, Any], rank: int) -> dict[str, set[str]]:
    """Train a step as one of two stages with host staging. Returns the devices of what torch was given to send and to receive."""
    given: dict[str, set[str]] = {}
    for name in ("send", "recv", "isend", "irecv"):
        given[name] = set()
        setattr(dist, name, _noting(given[name], getattr(dist, name)))
    stage_on_host()
    with playing(rank, 2) as gpu:
        config, engine, _ = build(values)
        assert gpu.live > 0
        engine.train_step(rank_batches(config, 0, 0, 1, config.train.micro_batch_size))
    return given


def _noting(devices: set[str], transfer: Any) -> Any:
    def call(tensor: Any, *arguments: Any, **options: Any) -> Any:
        devices.add(tensor.device.type)
        return transfer(tensor, *arguments, **options)

    return call


def stand_in(gpu: FakeGpu) -> None:
    """Let `torch.cuda` answer for the fake GPU, as far as the sections ask it."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.synchronize = lambda device=None: gpu.wait("synchronise")
    cuda.empty_cache = lambda: None
    cuda.mem_get_info = lambda device=None: (10**9, 10**9)
    cuda.reset_peak_memory_stats = lambda device=None: setattr(gpu, "peak", gpu.live)
    cuda.memory_stats = lambda device=None: {
        "requested_bytes.all.current": gpu.live, "requested_bytes.all.peak": gpu.peak,
    }  # fmt: skip
