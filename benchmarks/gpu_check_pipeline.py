"""Sections of `gpu_check.py` with two processes: on one device over gloo, and on two GPUs over NCCL, they train as the CPU does."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from gpu_check_equality import explain
from gpu_check_errors import KINDS, Comparison
from gpu_check_machine import Sizes, on_gpu
from gpu_check_models import compared
from gpu_check_report import Report
from links import LOOPBACK
from pair import ON_CPUS, run_pair

from lime_dist.config.load import dump_config
from lime_dist.config.schema import Config

STAGES = "parallel.pipeline_stages=2"
REPLICAS = ["parallel.zero_stage=1"]
CASES: dict[str, tuple[str, list[str]]] = {
    "llama": ("llama", [STAGES]),
    "lime full": ("lime full", [STAGES]),
    "lime chunked": ("lime chunked", [STAGES]),
    "hidden first_last": ("hidden first_last", [STAGES]),
    "dynamic full": ("dynamic full", [STAGES]),
    "hyper dynamic": ("hyper dynamic", [STAGES]),
    "lime chunked, stock engine": ("lime chunked", [STAGES, "pipeline.engine=stock"]),
    "lime chunked, two replicas, ZeRO-1": ("lime chunked", REPLICAS),
}
"""By name: the model, and what is added to its configuration."""
BLOCKING = {"lime full, CUDA_LAUNCH_BLOCKING=1": ("lime full", [STAGES, "pipeline.extra_in_flight=0"])}
"""Every launch waits for the device, so that a receive that is posted too early never ends."""


def measure(report: Report, sizes: Sizes) -> None:
    report.header = ["two processes", "precision", *KINDS]
    over_nccl = report.path.stem == "nccl"
    cases = {
        (name, precision): compared(model, sizes.pipeline, f"precision={precision}", *options)
        for precision in ("fp32", "bf16")
        for name, (model, options) in CASES.items()
        if model in sizes.models
    }
    check(report, cases, {"LIME_BACKEND": "nccl" if over_nccl else "gloo"} | ({} if on_gpu() else ON_CPUS))
    if over_nccl:
        blocking = {
            (name, "fp32"): compared(model, sizes.pipeline, *options) for name, (model, options) in BLOCKING.items()
        }
        check(report, blocking, {"LIME_BACKEND": "nccl", "CUDA_LAUNCH_BLOCKING": "1"})
    report.notes = [explain()]
    report.finish(f"{len(report.rows)} of {len(report.rows)} trainings equal the CPU's")


def check(report: Report, cases: dict[tuple[str, str], Config], variables: dict[str, str]) -> None:
    """Run all cases in two processes, and compare each."""
    with tempfile.TemporaryDirectory() as folder:
        texts = [dump_config(config) for config in cases.values()]
        run_pair(LOOPBACK, "gpu_check_worker.py", {"configs": texts, "results": folder}, variables)
        for index, ((name, precision), config) in enumerate(cases.items()):
            results = [torch.load(Path(folder) / f"{index}-{rank}.pt") for rank in range(2)]
            cells, problems = Comparison(config).check(results)
            report.problems += [f"{name} in {precision}: {problem}" for problem in problems]
            report.add(name, precision, *cells)
