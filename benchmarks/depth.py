"""Which memory over depth is worth its cost: compare architectures and history policies at the learning rate that suits each.

Each model is first trained once at each learning rate (--lrs), from a seed of its own (--sweep-seed). While a model's best rate is the
lowest or the highest tried, half or double of it is tried too, twice at most. At its best rate, other learning rates of its routers
are tried (--router-multiples). A rate at which the validation loss of some run rose by more than 0.1 between two points of its curve is
not chosen, nor a higher one. Then the chosen setting of each model is trained from --seeds, with the same order of the data for
all. Differences are paired by seed; intervals hold for all comparisons of the table together. Last, forward, loss and backward of each
model are timed on this machine, one model after another. All runs use Muon, unless an override says otherwise.

    python benchmarks/depth.py --data data/quickstart/shards --output runs/depth --jobs 2
    python benchmarks/depth.py --data … --output … --models llama lime-full lime-first_last --seeds 1 2 3 4 5 --steps 1600
    python benchmarks/depth.py optimizer.name=adamw --data … --output … --lrs 2e-3 4e-3
    python benchmarks/depth.py --data … --output … --minutes 60                (start no runs after that)
    python benchmarks/depth.py --data … --output … --spread                    (only LLaMA: how much do seeds differ?)
    python benchmarks/depth.py --output runs/depth --runs benchmarks/depth.jsonl    (the first comparison of RESULTS.md; trains nothing)

Resumable: after a stop, the same command finishes the rest. A run that has ended is kept as one line of --runs, and is not repeated
where its line is, also on another machine, if model, settings and data are the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from depth_table import draw, make_table, measure_costs, spread_table, sweep_table
from kept import KeptRuns, data_digest, only_data_digest
from memories import BASE, FULL, MODELS, Setting, Sweep
from runs import Study, add_options
from sweep import add_sweep_options, check_sweep_seed

from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

DEFAULT = [
    BASE, FULL, "lime-first_last", "lime-chunked", "hyper-dynamic", "value-residual", "attention-residuals",
]  # fmt: skip
SIZE = [
    "model.hidden_size=64", "model.intermediate_size=192", "model.num_hidden_layers=24", "model.num_attention_heads=4",
    "data.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8", "parallel.pipeline_stages=1",
    "train.evaluation_samples=200", "train.log_interval=50", "train.checkpoint_interval=200", "optimizer.name=muon",
    "optimizer.min_lr=1.0e-6",
]  # fmt: skip
"""The settings of all runs; overrides of the command line follow. Why Muon: see RESULTS.md."""
WARMUP_SHARE, CURVE_INTERVAL = 0.25, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=sorted(MODELS), metavar="MODEL",
                        help=f"of {', '.join(sorted(MODELS))}; {BASE} and {FULL} always run")  # fmt: skip
    parser.add_argument("--spread", action="store_true", help=f"train {BASE} alone, from --seeds at each of --lrs")
    arguments = parser.parse_args()
    if arguments.spread and len(arguments.seeds) < 2:
        raise LimeError("--spread compares seeds; give at least 2 --seeds")
    names = [BASE] if arguments.spread else list(dict.fromkeys([BASE, FULL, *arguments.models]))
    sweep = make_sweep(arguments, [(name, ()) for name in names])
    if arguments.spread:
        variants = {one.name: one.overrides for one in sweep.settings()}
        study = replace(sweep.study, variants=variants)
        study.run(arguments.jobs)
        report(study, spread_table(study, sweep.settings()), "spread.md")
        return
    chosen = choose(sweep, arguments, "sweep.md")
    study = replace(sweep.study, seeds=arguments.seeds, variants={one.name: one.overrides for one in chosen})
    study.run(arguments.jobs)
    seeds = finished(study)
    by_model = {one.model: one for one in chosen}
    ends = [one.model for one in chosen if sweep.at_an_end(one)]
    report(study, make_table(study, by_model, seeds, measure_costs(study, by_model), ends))
    draw(study, by_model, seeds)


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a study of memories over depth."""
    add_options(parser, steps=300, data_is_optional=True)
    parser.set_defaults(seeds=[2, 3, 4, 5, 6])
    parser.add_argument("--runs", type=user_path, help="file of finished runs (default: runs.jsonl in --output)")
    add_sweep_options(parser, [1.6e-2, 3.2e-2])
    parser.add_argument("--router-multiples", nargs="+", type=float, default=[3.0, 1.0],
                        help="learning rates of routers to try, as multiples; the first with every learning rate")  # fmt: skip


def make_sweep(arguments: argparse.Namespace, models: list[tuple[str, tuple[str, ...]]]) -> Sweep:
    """Return the sweep that a command line asks for.

    Raises:
        LimeError: an option is wrong, or the data cannot be read.
    """
    shared = [
        *SIZE, f"optimizer.warmup_steps={max(1, round(WARMUP_SHARE * arguments.steps))}",
        f"train.evaluation_interval={max(1, min(CURVE_INTERVAL, arguments.steps))}",
    ]  # fmt: skip
    path = arguments.runs or arguments.output / "runs.jsonl"
    kept = KeptRuns(path, data_digest(arguments.data) if arguments.data else only_data_digest(path))
    study = Study.from_options(arguments, shared, {})
    study = replace(study, kept=kept, only_reads=arguments.data is None)
    sweep = Sweep(study, models, arguments.lrs, arguments.router_multiples, arguments.sweep_seed)
    for one in sweep.settings():
        replace(study, variants={one.name: one.overrides}).model(one.name)  # report mistakes before anything runs
    return sweep


def choose(sweep: Sweep, arguments: argparse.Namespace, table: str) -> list[Setting]:
    """Return the best setting of each model. The losses of the sweep are reported, also if it could not end.

    Args:
        table: name of the file for them.

    Raises:
        LimeError: the runs to compare have the seed of the sweep, or the sweep could not end.
    """
    check_sweep_seed(arguments)
    try:
        return sweep.run(arguments.jobs)
    finally:
        report(sweep.study, sweep_table(sweep), table)


def finished(study: Study) -> list[int]:
    """Return the seeds that every model has finished.

    Raises:
        LimeError: they are fewer than two.
    """
    seeds = study.finished_seeds()
    if len(seeds) < 2:
        raise LimeError(
            f"{len(seeds)} seeds are finished for every model, and an interval needs 2; run the same command again"
        )
    return seeds


def report(study: Study, table: str, name: str = "table.md") -> None:
    (study.output / name).write_text(table)
    print(table)


if __name__ == "__main__":
    run_command(main)
