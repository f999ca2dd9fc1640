"""Which model learns best: trains models for the same steps on the same batches and seeds; a table and a picture.

    python benchmarks/quality.py --data data/quickstart/shards --output runs/quality
    python benchmarks/quality.py --data … --output … --models llama lime-kv --seeds 0 1 2 --steps 300 model.hidden_size=128

Every run is `pretrain.py` in one process, in its own folder of --output. A run that has its final validation is not
repeated, and one that was stopped goes on from its checkpoint, so the same command finishes what a stop left over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lime_dist import load_config
from lime_dist.errors import LimeError, run_command
from lime_dist.model.cost import count_parameters

ROOT = Path(__file__).resolve().parents[1]

MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "hyper-static": ["model.architecture=hyper", "model.hyper.dynamic=false"],
    "hyper-dynamic": ["model.architecture=hyper"],
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
"""What the table in RESULTS.md was made with; overrides on the command line come after it."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with dataset.json")
    parser.add_argument("--output", required=True, type=Path, help="folder for the runs, the table and the picture")
    parser.add_argument("--config", default=ROOT / "configs/quickstart.yaml", type=Path, help="what all runs share")
    parser.add_argument("--models", nargs="+", default=["llama", "hyper-dynamic", "lime-static", "lime-dynamic", "lime-kv"],
                        choices=sorted(MODELS), metavar="MODEL", help=f"of {', '.join(sorted(MODELS))}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.data, arguments.output = arguments.data.resolve(), arguments.output.resolve()
    shared = [*SIZE, *arguments.overrides, f"train.steps={arguments.steps}", f"data.path={arguments.data}"]
    for model in arguments.models:
        load_config(arguments.config, [*shared, *MODELS[model]])  # a mistake shows before anything runs
    arguments.output.mkdir(parents=True, exist_ok=True)
    pairs = [(model, seed) for seed in arguments.seeds for model in arguments.models]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda pair: run(arguments, shared, *pair), pairs))
    table = make_table(arguments, shared)
    (arguments.output / "table.md").write_text(table)
    print(table)
    draw(arguments)


def folder(arguments: argparse.Namespace, model: str, seed: int) -> Path:
    return Path(arguments.output) / f"{model}-seed{seed}"


def run(arguments: argparse.Namespace, shared: list[str], model: str, seed: int) -> None:
    """One training run, unless it is there already."""
    directory = folder(arguments, model, seed)
    overrides = [*shared, *MODELS[model], f"train.seed={seed}", f"data.seed={seed}", f"run.directory={directory}"]
    config = load_config(arguments.config, overrides)
    there = directory / "config.yaml"
    if there.exists() and load_config(there) != config:
        raise LimeError(f"{directory} holds a run with other settings; give another --output, or delete it")
    if final_validation(directory, arguments.steps) is not None:
        print(f"{directory.name}: there already", flush=True)
        return
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    command = [sys.executable, str(ROOT / "pretrain.py"), "--config", str(arguments.config), *overrides]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise LimeError(f"{directory.name} ended with status {finished.returncode}: {last}")
    print(f"{directory.name}: {time.perf_counter() - begin:.0f} s", flush=True)


def records(directory: Path) -> list[dict[str, float]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_validation(directory: Path, steps: int) -> float | None:
    for record in records(directory):
        if record["step"] == steps and "validation_loss" in record:
            return record["validation_loss"]
    return None


def make_table(arguments: argparse.Namespace, shared: list[str]) -> str:
    """Validation loss (mean ± standard deviation over seeds), parameters, median seconds a step."""
    lines = ["| model | validation loss | difference to the first | parameters | s/step |", "|---|---|---|---|---|"]
    base: list[float] | None = None
    for model in arguments.models:
        losses = [final_validation(folder(arguments, model, seed), arguments.steps) for seed in arguments.seeds]
        found = [loss for loss in losses if loss is not None]
        assert len(found) == len(losses)
        base = base or found
        paired = [loss - other for loss, other in zip(found, base, strict=True)]
        seconds = statistics.median(
            record["step_seconds"]
            for seed in arguments.seeds
            for record in records(folder(arguments, model, seed))
            if "step_seconds" in record
        )
        count = count_parameters(load_config(arguments.config, [*shared, *MODELS[model]]).model)
        lines.append(
            f"| {model} | {mean_and_spread(found)} | {mean_and_spread(paired, sign='+')} | {count:,} | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.4f} ± {spread:.4f}"


def draw(arguments: argparse.Namespace) -> None:
    """Training loss (smoothed) and validation loss against tokens, mean over seeds."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install -c constraints.txt -e '.[analysis]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for model in arguments.models:
        runs = [records(folder(arguments, model, seed)) for seed in arguments.seeds]
        steps = [[record for record in one if "loss" in record] for one in runs]
        loss = [statistics.fmean(same) for same in zip(*([r["loss"] for r in one] for one in steps), strict=True)]
        window = max(1, len(loss) // 20)
        smooth = [statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in range(len(loss))]
        tokens = [record["tokens"] for record in steps[0]]
        (line,) = axes.plot(tokens[window:], smooth[window:], label=model, linewidth=1)
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
    path = Path(arguments.output) / "loss.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(main)
