"""Section of `gpu_check.py`: the peak of live bytes of a training step over what the plan says, for every model."""

from __future__ import annotations

from gpu_check_engine import trainer
from gpu_check_machine import Sizes
from gpu_check_models import MODELS
from gpu_check_report import Report

from lime_dist import load_config
from lime_dist.distributed import start_processes

RUN = ["precision=bf16", "model.num_hidden_layers=8", "train.global_batch_size=4", "train.micro_batch_size=2"]
ALLOWED = 0.05
"""Largest error of the plan."""


def measure(report: Report, sizes: Sizes) -> None:
    start_processes()
    report.header = ["model", "planned, MB", "measured, MB", "measured / planned", "checkpointed: measured / planned"]
    worst = 0.0
    for name in sizes.models:
        ratios, numbers = [], []
        for checkpointed in (False, True):
            options = [*RUN, f"parallel.activation_checkpointing={str(checkpointed).lower()}"]
            config = load_config(None, [*sizes.shape, *options, *MODELS[name]])
            with trainer(config) as run:
                run.step()
                planned, measured = run.planned_bytes, run.peak_bytes()
            numbers += [f"{planned / 1e6:.1f}", f"{measured / 1e6:.1f}"]
            ratios.append(measured / planned)
            worst = max(worst, abs(ratios[-1] - 1))
            if abs(ratios[-1] - 1) > ALLOWED:
                report.problems.append(f"{name}{', checkpointed' * checkpointed}: {ratios[-1]:.3f} of the plan")
        report.add(name, *numbers[:2], *(f"{ratio:.3f}" for ratio in ratios))
    report.notes = ["8 layers in bf16, one stage, two micro-batches. Bytes are those that tensors ask for."]
    report.finish(f"the plan is at most {worst:.1%} off")
