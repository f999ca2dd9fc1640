"""Section of `gpu_check.py`: kernels of a layer in a micro-batch, and how often the host waits for the device in a step."""

from __future__ import annotations

from functools import partial

from gpu_check_engine import trainer
from gpu_check_machine import Sizes, on_gpu
from gpu_check_models import MODELS
from gpu_check_report import Report
from gpu_check_trace import Trace, traced

from lime_dist import load_config
from lime_dist.distributed import start_processes
from lime_dist.model.architecture import BASELINE

RUN = ["precision=bf16", "train.global_batch_size=3", "train.micro_batch_size=1"]
LAYERS = (4, 8)
"""Two depths, whose difference leaves out embedding and head."""
MICRO_BATCHES = (1, 3)
"""Two lengths of a step, whose difference leaves out the update."""


def measure(report: Report, sizes: Sizes) -> None:
    start_processes()
    what = "kernels" if on_gpu() else "operations (no GPU, so no kernels)"
    report.header = ["model", f"{what} a layer, forward and backward", "over LLaMA's", "host waits a step"]
    baseline = waits = 0.0
    for name in sizes.models:
        traces = {layers: trace_steps([*sizes.shape, *RUN, *MODELS[name]], layers) for layers in LAYERS}
        a_micro_batch = [(few.launches, many.launches) for few, many in traces.values()]
        (shallow, deep) = ((many - few) / (MICRO_BATCHES[1] - MICRO_BATCHES[0]) for few, many in a_micro_batch)
        a_layer = (deep - shallow) / (LAYERS[1] - LAYERS[0])
        baseline = a_layer if name == BASELINE else baseline
        step = traces[LAYERS[1]][1]
        waits = max(waits, step.waits + step.pageable)
        waited = f"{step.waits} + {step.pageable} copies from or to pageable memory" if on_gpu() else "no GPU"
        if not baseline:
            report.problems.append("the profiler saw no kernels; it may need rights to CUPTI")
            break
        report.add(name, f"{a_layer:.1f}", f"{a_layer / baseline:.2f}", waited)
    report.notes = [
        f"Steps of {MICRO_BATCHES[1]} micro-batches, {LAYERS[1]} layers. A host that waits in the middle of a step lets the device "
        "run dry; a step needs one wait, for its loss and norm."
    ]
    report.finish(f"LLaMA: {baseline:.0f} a layer" + (f"; at most {waits:.0f} host waits a step" if on_gpu() else ""))


def trace_steps(overrides: list[str], layers: int) -> tuple[Trace, Trace]:
    """Traces of a short and of a long step."""
    config = load_config(None, [*overrides, f"model.num_hidden_layers={layers}"])
    with trainer(config) as run:
        for micro_batches in MICRO_BATCHES:
            run.step(micro_batches)
        short, long = (traced(partial(run.step, micro_batches)) for micro_batches in MICRO_BATCHES)
    return short, long
