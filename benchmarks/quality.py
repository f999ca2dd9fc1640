"""Compare how well models learn: train them for the same steps on the same batches and seeds; make a table and a picture.

    python benchmarks/quality.py --data data/quickstart/shards --output runs/quality
    python benchmarks/quality.py --data … --output … --models llama lime-kv --seeds 0 1 2 --steps 300 model.hidden_size=128

Resumable: after a stop, the same command finishes the rest (`runs.py`).
"""

from __future__ import annotations

import argparse
import statistics

from results import plotting
from runs import Study, add_options

from lime_dist.errors import LimeError, run_command
from lime_dist.model.cost import count_parameters

MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "hyper-static": ["model.architecture=hyper", "model.hyper.dynamic=false"],
    "hyper-dynamic": ["model.architecture=hyper"],
    "mhc": ["model.architecture=hyper", "model.hyper.connection=doubly_stochastic"],
    "mhc-lite": ["model.architecture=hyper", "model.hyper.connection=permutations"],
    "gated-residual": ["model.architecture=gated_residual"],
    "value-residual": ["model.architecture=value_residual"],
    "attention-residuals": ["model.architecture=attention_residuals"],
    "moda": ["model.lime.depth_attention=moda", "model.lime.mlp_entries=true"],
    "lime-static": ["model.lime.routes=hidden"],
    "lime-dynamic": ["model.lime.routes=hidden", "model.lime.router=dynamic"],
    "lime-kv": ["model.lime.routes=kv"],
    "lime-kv-identity": ["model.lime.routes=kv", "model.lime.router_init=identity"],
}

SIZE = [
    "model.hidden_size=96", "model.intermediate_size=256", "model.num_hidden_layers=8", "model.num_attention_heads=4",
    "data.sequence_length=128", "train.global_batch_size=16", "train.micro_batch_size=16", "parallel.pipeline_stages=1",
    "train.evaluation_samples=256", "train.log_interval=100", "train.checkpoint_interval=100",
]  # fmt: skip
"""The settings behind the table in RESULTS.md; overrides of the command line follow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=400)
    parser.add_argument("--models", nargs="+", default=["llama", "hyper-dynamic", "lime-static", "lime-dynamic", "lime-kv"],
                        choices=sorted(MODELS), metavar="MODEL", help=f"of {', '.join(sorted(MODELS))}")  # fmt: skip
    arguments = parser.parse_args()
    study = Study.from_options(arguments, SIZE, {name: MODELS[name] for name in arguments.models})
    study.run(arguments.jobs, arguments.minutes)
    seeds = study.finished_seeds()
    if not seeds:
        raise LimeError("no seed is finished for every model; run the same command again")
    table = make_table(study, seeds)
    (study.output / "table.md").write_text(table)
    print(table)
    draw(study, seeds)


def make_table(study: Study, seeds: list[int]) -> str:
    """Return the table: validation loss (mean ± standard deviation over seeds), parameters, median seconds per step."""
    lines = ["| model | validation loss | difference to the first | parameters | s/step |", "|---|---|---|---|---|"]
    base: list[float] | None = None
    for name in study.variants:
        losses = study.losses(name, seeds)
        base = base or losses
        paired = [loss - other for loss, other in zip(losses, base, strict=True)]
        seconds = statistics.median(
            record["step_seconds"] for seed in seeds for record in study.records(name, seed) if "step_seconds" in record
        )
        count = count_parameters(study.model(name).model)
        lines.append(
            f"| {name} | {mean_and_spread(losses)} | {mean_and_spread(paired, sign='+')} | {count:,} | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float], sign: str = "", digits: int = 4) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {spread:.{digits}f}"


def draw(study: Study, seeds: list[int]) -> None:
    """Draw training loss (smoothed) and validation loss against tokens, as means over seeds."""
    if (pyplot := plotting()) is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in study.variants:
        runs = [study.records(name, seed) for seed in seeds]
        steps = [[record for record in one if "loss" in record] for one in runs]
        loss = [statistics.fmean(same) for same in zip(*([r["loss"] for r in one] for one in steps), strict=True)]
        window = max(1, len(loss) // 20)
        smooth = [statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in range(len(loss))]
        tokens = [record["tokens"] for record in steps[0]]
        (line,) = axes.plot(tokens[window:], smooth[window:], label=name, linewidth=1)
        validations = [[record for record in one if "validation_loss" in record] for one in runs]
        points = {record["tokens"] for record in validations[0]}
        for point in points:
            values = [r["validation_loss"] for one in validations for r in one if r["tokens"] == point]
            axes.plot(point, statistics.fmean(values), "o", color=line.get_color(), markersize=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token (line: training, dots: validation)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = study.output / "loss.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(main)
