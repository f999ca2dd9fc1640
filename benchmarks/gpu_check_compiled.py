"""Section of `gpu_check.py`: with `train.compile` the device trains as the CPU does, and how fast."""

from __future__ import annotations

import time
from statistics import median

import torch
from gpu_check_cluster import CONFIGS, WARM_UP, cut
from gpu_check_engine import trainer
from gpu_check_equality import compare, explain
from gpu_check_errors import KINDS
from gpu_check_machine import Sizes, exact_float32, memory_at_hand
from gpu_check_models import compared
from gpu_check_report import Report

from lime_dist.config.load import make_config
from lime_dist.distributed import start_processes

CASES = (("lime full", "fp32"), ("lime full", "bf16"), ("hidden first_last", "bf16"))
MEASURED = "lime_64_2x8.yaml"
"""The configuration whose speed is measured."""


def measure(report: Report, sizes: Sizes) -> None:
    start_processes()
    exact_float32()
    report.header = ["compiled model", "precision", *KINDS]
    for model, precision in CASES:
        torch._dynamo.reset()  # a process compiles a function only for a limited number of settings
        cells, problems = compare(compared(model, sizes.equality, f"precision={precision}", "train.compile=true"))
        report.problems += [f"{model} in {precision}: {problem}" for problem in problems]
        report.add(model, precision, *cells)
    report.notes = [explain()]
    config = cut(CONFIGS / MEASURED, sizes, memory_at_hand())
    seconds = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        values = config.model_dump(mode="json")
        values["train"]["compile"] = compiled
        begin = time.perf_counter()
        with trainer(make_config(values, "the check")) as run:
            run.step()
            first = time.perf_counter() - begin
            run.seconds(WARM_UP)
            seconds[compiled] = median(run.seconds(sizes.steps))
    ratio = seconds[True] / seconds[False]
    report.notes.append(
        f"{MEASURED}, cut to one stage: {seconds[False]:.3f} s a step, compiled {seconds[True]:.3f} s ({ratio:.2f}); "
        f"the first step with building and compiling took {first:.0f} s."
    )
    report.finish(f"a step takes {ratio:.2f} of what it takes without compiling")
