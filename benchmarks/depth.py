"""Which memory over depth is worth its cost: compare architectures and history policies at the learning rate that suits each.

First every model is trained once for each learning rate, and each multiple of it for its routers, from a seed of its own (--sweep-seed). Then
the best setting of each is trained from the seeds given, which are the same for all models, and so is the order of the data. Differences are
paired by seed; intervals hold for all comparisons of the table together.

    python benchmarks/depth.py --data data/quickstart/shards --output runs/depth --jobs 2
    python benchmarks/depth.py --data … --output … --models llama lime-full lime-first_last --seeds 1 2 3 4 5 --steps 3200
    python benchmarks/depth.py --data … --output … --minutes 60                (start no runs after that)
    python benchmarks/depth.py --data … --output … --spread                    (only LLaMA: how much do seeds differ?)

Resumable: after a stop, the same command finishes the rest (`runs.py`). Seconds per step are those of the runs, which disturb each other;
`step_cost.py` measures them apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from history_quality import chunked, first_last
from pairs import mean_interval
from quality import MODELS as ARCHITECTURES
from results import plotting
from runs import Study, add_options
from sweep import add_sweep_options, check_sweep_seed, sweep_losses

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of
from lime_dist.model.parameters import stage_parameters

BASE, FULL = "llama", "lime-full"
MODELS: dict[str, list[str]] = {
    **{name: overrides for name, overrides in ARCHITECTURES.items() if not name.startswith("lime-kv")},
    FULL: [],
    "lime-full-identity": ["model.lime.router_init=identity"],
    "lime-first_last": [first_last(2, 1)],
    "lime-chunked": [chunked(8, 1, 2)],
    "lime-chunked-identity": [chunked(8, 1, 2), "model.lime.router_init=identity"],
    "lime-dilated": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
}
DEFAULT = [
    BASE, FULL, "lime-first_last", "lime-chunked", "lime-static", "hyper-dynamic", "mhc-lite", "value-residual", "attention-residuals",
]  # fmt: skip
SIZE = [
    "model.hidden_size=64", "model.intermediate_size=192", "model.num_hidden_layers=32", "model.num_attention_heads=4",
    "data.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8", "parallel.pipeline_stages=1",
    "train.evaluation_samples=200", "train.log_interval=50", "train.checkpoint_interval=200", "optimizer.min_lr=1.0e-6",
]  # fmt: skip
"""The settings of all runs; overrides of the command line follow."""
WARMUP_SHARE, CURVE_POINTS = 0.15, 16
SPREAD_SEEDS = 5


@dataclass(frozen=True)
class Setting:
    """A model with the learning rates of a run."""

    model: str
    lr: float
    router_multiple: float

    @property
    def name(self) -> str:
        return f"{self.model}-lr{self.lr:g}-x{self.router_multiple:g}"

    @property
    def overrides(self) -> list[str]:
        return [*MODELS[self.model], f"optimizer.lr={self.lr}", f"optimizer.router_lr={self.lr * self.router_multiple}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=1600)
    parser.set_defaults(seeds=[1, 2, 3])
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=sorted(MODELS), metavar="MODEL",
                        help=f"of {', '.join(sorted(MODELS))}; {BASE} and {FULL} always run")  # fmt: skip
    add_sweep_options(parser, [5e-4, 1e-3, 2e-3])
    parser.add_argument("--router-multiples", nargs="+", type=float, default=[1.0, 3.0],
                        help="learning rates of routers to try, as multiples")  # fmt: skip
    parser.add_argument(
        "--spread", action="store_true", help=f"train {BASE} alone, from {SPREAD_SEEDS} seeds at each learning rate"
    )
    arguments = parser.parse_args()
    check_sweep_seed(arguments)
    shared = [
        *SIZE, f"optimizer.warmup_steps={max(1, round(WARMUP_SHARE * arguments.steps))}",
        f"train.evaluation_interval={max(1, arguments.steps // CURVE_POINTS)}",
    ]  # fmt: skip
    names = [BASE] if arguments.spread else list(dict.fromkeys([BASE, FULL, *arguments.models]))
    settings = [
        Setting(name, lr, multiple)
        for name in names
        for lr in arguments.lrs
        for multiple in (arguments.router_multiples if has_routers(name) else [1.0])
    ]
    sweep = Study.from_options(arguments, shared, {one.name: one.overrides for one in settings})
    if arguments.spread:
        study = replace(sweep, seeds=range(SPREAD_SEEDS))
        study.run(arguments.jobs, arguments.minutes)
        report(study, spread_table(study, settings))
        return
    sweep = replace(sweep, seeds=[arguments.sweep_seed])
    sweep.run(arguments.jobs, arguments.minutes)
    chosen = {name: best(sweep, [one for one in settings if one.model == name], arguments.sweep_seed) for name in names}
    study = replace(sweep, seeds=arguments.seeds, variants={one.name: one.overrides for one in chosen.values()})
    study.run(arguments.jobs, arguments.minutes)
    seeds = study.finished_seeds()
    if len(seeds) < 2:
        raise LimeError(
            f"{len(seeds)} seeds are finished for every model, and an interval needs 2; run the same command again"
        )
    report(study, make_table(study, chosen, seeds))
    draw(study, chosen, seeds)


def has_routers(name: str) -> bool:
    """Return whether a model has parameters with the learning rate of routers."""
    model = load_config(None, MODELS[name]).model
    group = architecture_of(model).parameter_group
    return any(group(each) == "routers" for each in stage_parameters(model, range(model.num_hidden_layers)))


def best(sweep: Study, settings: Sequence[Setting], seed: int) -> Setting:
    """Return the setting with the lowest validation loss."""
    losses = sweep_losses(sweep, [one.name for one in settings], seed)
    return min(settings, key=lambda one: losses[one.name])


def report(study: Study, table: str) -> None:
    (study.output / "table.md").write_text(table)
    print(table)


def spread_table(study: Study, settings: Sequence[Setting]) -> str:
    """Return how much seeds differ at each learning rate."""
    lines = ["| learning rate | seeds | validation loss | standard deviation |", "|---|---|---|---|"]
    for one in settings:
        losses = [loss for seed in study.seeds if (loss := study.validation(one.name, seed)) is not None]
        if len(losses) > 1:
            lines.append(
                f"| {one.lr:g} | {len(losses)} | {statistics.fmean(losses):.4f} | {statistics.stdev(losses):.4f} |"
            )
    return "\n".join(lines) + "\n"


def flops(config: Config) -> float:
    """Return model FLOPs per token, forwards and backwards."""
    layers = cost.layer_flops(config.model, config.data.sequence_length)
    return float(sum(layer.both for layer in layers) + cost.head_flops(config.model).both)


def curve(study: Study, setting: Setting, seeds: Sequence[int]) -> list[tuple[int, float]]:
    """Return (tokens, validation loss), the mean over seeds."""
    runs = [
        {
            int(record["tokens"]): record["validation_loss"]
            for record in study.records(setting.name, seed)
            if "validation_loss" in record
        }
        for seed in seeds
    ]
    return [
        (tokens, statistics.fmean(one[tokens] for one in runs)) for tokens in sorted(set.intersection(*map(set, runs)))
    ]


def make_table(study: Study, chosen: dict[str, Setting], seeds: Sequence[int]) -> str:
    """Return the table: losses and their paired differences, and what each model costs."""
    count = 2 * len(chosen) - 3  # differences to LLaMA and to the full history, without the one that is there twice
    losses = {name: study.losses(one.name, seeds) for name, one in chosen.items()}
    base = study.model(chosen[BASE].name)
    target = statistics.fmean(losses[BASE])
    lines = [
        f"| model | learning rate, routers' | validation loss, {len(seeds)} seeds | minus {BASE}'s | minus {FULL}'s | parameters | "
        f"FLOPs over {BASE} | s/step over {BASE} | entries over the last of 4 boundaries | tokens to {BASE}'s loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    pace = {name: seconds_per_step(study, one, seeds) for name, one in chosen.items()}
    for name, one in chosen.items():
        config, layers = study.model(one.name), study.model(one.name).model.num_hidden_layers
        reached = next((tokens for tokens, loss in curve(study, one, seeds) if loss <= target), None)
        lines.append(
            f"| {name} | {one.lr:g}, {one.lr * one.router_multiple:g} | {statistics.fmean(losses[name]):.4f} ± "
            f"{statistics.stdev(losses[name]):.4f} | {difference(losses[name], losses[BASE], count)} | "
            f"{difference(losses[name], losses[FULL], count)} | {cost.count_parameters(config.model):,} | "
            f"{flops(config) / flops(base):.3f} | {pace[name] / pace[BASE]:.2f} | "
            f"{cost.boundary_entries(config.model, layers - layers // 4)} | {'not reached' if reached is None else f'{reached:,}'} |"
        )
    return (
        "\n".join(lines) + f"\n\nIntervals hold for all {count} comparisons together with 95 % (Student, Bonferroni).\n"
    )


def difference(losses: Sequence[float], others: Sequence[float], comparisons: int) -> str:
    """Return the mean of the paired differences with its interval, and whether its sign is resolved."""
    pairs = [a - b for a, b in zip(losses, others, strict=True)]
    if not any(pairs):
        return ""
    low, high = mean_interval(pairs, comparisons)
    verdict = "better" if high < 0 else "worse" if low > 0 else "not resolved"
    return f"{statistics.fmean(pairs):+.4f} [{low:+.4f}, {high:+.4f}] {verdict}"


def seconds_per_step(study: Study, setting: Setting, seeds: Sequence[int]) -> float:
    return statistics.median(
        record["step_seconds"]
        for seed in seeds
        for record in study.records(setting.name, seed)
        if "step_seconds" in record
    )


def draw(study: Study, chosen: dict[str, Setting], seeds: Sequence[int]) -> None:
    """Draw validation loss against FLOPs, as means over seeds."""
    if (pyplot := plotting()) is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, one in chosen.items():
        each = flops(study.model(one.name))
        points = curve(study, one, seeds)
        axes.plot([tokens * each for tokens, _ in points], [loss for _, loss in points], "o-", markersize=3, label=name)
    axes.set_xlabel("model FLOPs")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_xscale("log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = study.output / "depth.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(main)
