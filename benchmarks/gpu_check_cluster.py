"""Section of `gpu_check.py`: tokens/s and MFU of the configurations in configs/cluster, cut to one stage and to the memory at hand."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from gpu_check_engine import planned_bytes, trainer
from gpu_check_machine import ROOT, Sizes, device, memory_at_hand, on_gpu
from gpu_check_report import Report
from gpu_check_trace import traced
from step_cost import step_flops

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.distributed import start_processes
from lime_dist.errors import LimeError
from lime_dist.monitor.peak import measured_flops

CONFIGS = ROOT / "configs/cluster"
SHARE = 0.85
"""Of the memory at hand that the plan may use: the allocator and libraries need some too."""
WARM_UP = 2
"""Steps before those that are timed."""


def measure(report: Report, sizes: Sizes) -> None:
    from equality import DTYPES

    start_processes()
    report.header = [
        "configuration", "layers", "micro-batch", "parameters, M", "s/step", "tokens/s", "MFU", "device busy",
        "measured / planned memory",
    ]  # fmt: skip
    measured: dict[str, str] = {}
    best = 0.0
    peak = 0.0
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            config = cut(path, sizes, memory_at_hand())
        except LimeError as error:
            report.problems.append(str(error))
            continue
        same = measured.setdefault(repr((config.model, config.train)), path.stem)
        if same != path.stem:
            report.add(path.stem, f"the same stage as {same}", *[""] * (len(report.header) - 2))
            continue
        peak = peak or measured_flops(device(), DTYPES[config.precision])
        with trainer(config) as run:
            for _ in range(WARM_UP):
                run.step()
            seconds = median(run.seconds(sizes.steps))
            busy = f"{traced(run.step).busy:.0%}" if on_gpu() else "no GPU"
            ratio = run.peak_bytes() / run.planned_bytes
            parameters = sum(parameter.numel() for parameter in run.optimizer.parameters.values())
        tokens = config.train.global_batch_size * config.data.sequence_length
        mfu = tokens * step_flops(config.model, config.data.sequence_length) / seconds / peak
        best = max(best, mfu)
        report.add(
            path.stem, str(config.model.num_hidden_layers), str(config.train.micro_batch_size), f"{parameters / 1e6:.0f}",
            f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{mfu:.1%}", busy, f"{ratio:.3f}",
        )  # fmt: skip
    report.notes = [
        f"One stage's layers with embedding and head; {sizes.cluster_micro_batches} micro-batches a step. MFU is relative to "
        f"{peak / 1e12:.3g} TFLOP/s, which a large matrix product reaches here."
    ]
    report.finish(f"MFU up to {best:.1%} of {peak / 1e12:.3g} TFLOP/s")


def cut(path: Path, sizes: Sizes, memory: int) -> Config:
    """One stage of a configuration: as many layers as its stages have on average, fewer samples and then fewer layers if they do not
    fit into ``memory`` bytes.

    Raises:
        LimeError: not even one layer with one sample fits.
    """
    whole = load_config(path, sizes.cluster)
    layers = whole.model.num_hidden_layers // whole.parallel.pipeline_stages
    samples = whole.train.micro_batch_size
    while True:
        overrides = [
            *sizes.cluster, f"model.num_hidden_layers={layers}", "parallel.pipeline_stages=1", "parallel.stage_layers=null",
            f"train.micro_batch_size={samples}", f"train.global_batch_size={samples * sizes.cluster_micro_batches}",
            "parallel.zero_stage=0",
        ]  # fmt: skip
        config = load_config(path, overrides)
        if planned_bytes(config) <= SHARE * memory:
            return config
        if samples == layers == 1:
            raise LimeError(f"{path.name}: not even one layer with one sample fits into {memory / 1e9:.1f} GB")
        samples, layers = (samples // 2, layers) if samples > 1 else (1, max(1, layers * 3 // 4))
