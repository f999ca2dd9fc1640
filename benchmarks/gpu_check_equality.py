"""Section of `gpu_check.py`: one process on the device trains as the CPU does, for every model, in float32 and bf16."""

from __future__ import annotations

from equality import train_stage
from gpu_check_engine import trainer
from gpu_check_errors import EVALUATION_MICRO_BATCH_SIZE, KINDS, STEPS, Comparison
from gpu_check_machine import Sizes, exact_float32
from gpu_check_models import compared
from gpu_check_report import Report

from lime_dist.config.schema import Config
from lime_dist.distributed import start_processes

CHECKPOINTED = {"lime chunked", "hidden chunked"}
DOCUMENTS = {"llama", "lime full", "moda"}
MASKED = ["data.document_mask=true", "model.vocab_size=8", "data.sequence_length=300"]
"""Documents of eight tokens on average, in three blocks of flex attention."""
NUMERICS = ["model.numerics={qk_norm: true, logit_softcap: 3.0}", "train.z_loss=0.01"]


def measure(report: Report, sizes: Sizes) -> None:
    """Train every model on the device with the real engine, and compare with the decoder on the CPU."""
    start_processes()
    exact_float32()
    report.header = ["model", "precision", *KINDS]
    cases: dict[tuple[str, str], Config] = {}
    for precision in ("fp32", "bf16"):
        for model in sizes.models:
            cases[model, precision] = compared(model, sizes.equality, f"precision={precision}")
        for model in CHECKPOINTED & set(sizes.models):
            options = (f"precision={precision}", "parallel.activation_checkpointing=true")
            cases[f"{model}, checkpointed", precision] = compared(model, sizes.equality, *options)
        for model in DOCUMENTS & set(sizes.models):
            cases[f"{model}, documents", precision] = compared(
                model, sizes.equality, f"precision={precision}", *MASKED, *NUMERICS
            )
    for (model, precision), config in cases.items():
        cells, problems = compare(config)
        report.problems += [f"{model} in {precision}: {problem}" for problem in problems]
        report.add(model, precision, *cells)
    report.notes = [explain()]
    report.finish(f"{len(cases)} of {len(cases)} trainings equal the CPU's")


def explain() -> str:
    """What the cells of a comparison mean."""
    return (
        f"{STEPS} steps, each with 4 micro-batches and clipping. Cells: largest relative error against float64 over all tensors; "
        "in brackets that of the CPU in the same precision."
    )


def compare(config: Config) -> tuple[list[str], list[str]]:
    """Train on this process's device and compare."""
    comparison = Comparison(config)
    with trainer(config) as run:
        return comparison.check([train_stage(run.engine, run.optimizer, config, STEPS, EVALUATION_MICRO_BATCH_SIZE)])
