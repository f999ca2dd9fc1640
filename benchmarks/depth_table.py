"""The tables and the picture of `depth.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from memories import BASE, FULL, Setting, Sweep
from pairs import mean_and_spread, mean_interval
from results import plotting, read_results, write_results
from runs import Study
from training_step import Subject, step_peak_bytes, step_seconds

from lime_dist import build_decoder
from lime_dist.config.schema import Config
from lime_dist.model import cost

Curve = list[tuple[int, float]]
"""Tokens, validation loss."""
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """What a step of a model costs in one process, over LLaMA's."""

    seconds: float
    peak: float


def measure_costs(study: Study, chosen: dict[str, Setting]) -> dict[str, Cost]:
    """Return what forward, loss and backward of each model cost; what was measured before is read from results.json.

    Each round runs every model once; the first warms up. Seconds are the median over rounds of the ratio to LLaMA's of the same round.
    """
    models = {name: study.model(one.name).model.model_dump(mode="json") for name, one in chosen.items()}
    results = read_results(study.output, {})
    if results.get("models") != models:
        results = {"models": models, "costs": _measure_costs(study, chosen)}
        write_results(study.output, {}, results)
    return {name: Cost(**one) for name, one in results["costs"].items()}


def _measure_costs(study: Study, chosen: dict[str, Setting]) -> dict[str, dict[str, float]]:
    print("timing a step of each model …", flush=True)
    torch.set_num_threads(1)
    config = study.model(chosen[BASE].name)
    size = (config.train.micro_batch_size or 1, config.data.sequence_length)
    torch.manual_seed(0)
    batch = torch.randint(config.model.vocab_size, size), torch.randint(config.model.vocab_size, size)
    subjects = {}
    for name, one in chosen.items():
        decoder = build_decoder(study.model(one.name).model)
        subjects[name] = Subject(decoder, decoder)
    rounds = [{name: step_seconds(subject, batch) for name, subject in subjects.items()} for _ in range(ROUNDS + 1)]
    peaks = {name: step_peak_bytes(subject, batch) for name, subject in subjects.items()}
    return {
        name: {
            "seconds": statistics.median(one[name] / one[BASE] for one in rounds[1:]),
            "peak": peaks[name] / peaks[BASE],
        }
        for name in chosen
    }


def make_table(
    study: Study, chosen: dict[str, Setting], seeds: Sequence[int], costs: dict[str, Cost], ends: Sequence[str] = ()
) -> str:
    """Return two tables: how well models learn, with differences paired by seed, and what they cost.

    Args:
        ends: models whose best learning rate is the lowest or highest of those tried.
    """
    count = 2 * len(chosen) - 3  # differences to LLaMA and to the full history, without the one that is there twice
    losses = {name: study.losses(one.name, seeds) for name, one in chosen.items()}
    base = study.model(chosen[BASE].name)
    target = statistics.fmean(losses[BASE])
    learning = [
        f"| model | learning rate, routers' | validation loss, {len(seeds)} seeds | minus {BASE}'s | minus {FULL}'s | "
        f"at {BASE}'s FLOPs, minus {BASE}'s | at {BASE}'s time | tokens to {BASE}'s loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    costing = [
        f"| model | parameters | FLOPs over {BASE} | seconds of forward, loss and backward over {BASE} | peak memory over {BASE} | entries over the last of 3 boundaries |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in chosen.items():
        config = study.model(one.name)
        ratio, points = flops(config) / flops(base), curve(study, one, seeds)
        reached = next((tokens for tokens, loss in points if loss <= target), None)
        at_cost = [f"{loss_at(points, points[-1][0] / over) - target:+.4f}" for over in (ratio, costs[name].seconds)]
        learning.append(
            f"| {name} | {one.lr:g}, {one.lr * one.router_multiple:g}{' (at an end)' if name in ends else ''} | "
            f"{mean_and_spread(losses[name])} | {difference(losses[name], losses[BASE], count)} | "
            f"{difference(losses[name], losses[FULL], count)} | {' | '.join(at_cost)} | "
            f"{'not reached' if reached is None else f'{reached:,}'} |"
        )
        costing.append(
            f"| {name} | {cost.count_parameters(config.model):,} | {ratio:.3f} | {costs[name].seconds:.2f} | "
            f"{costs[name].peak:.2f} | {entries(config)} |"
        )
    notes = [
        f"Intervals hold for all {count} comparisons together with 95 % (Student, Bonferroni). Losses at {BASE}'s FLOPs and time are read off",
        "within the curves, where the learning rate has not fallen as far as at their ends: a shorter schedule would end lower. ± is the",
        "standard deviation over seeds.",
    ]
    return "\n".join([*learning, "", *notes, "", *costing]) + "\n"


def entries(config: Config) -> int:
    """Return how many entries cross the boundary before the last quarter of the layers."""
    layers = config.model.num_hidden_layers
    return cost.boundary_entries(config.model, layers - layers // 4)


def flops(config: Config) -> float:
    """Return model FLOPs per token, forwards and backwards."""
    layers = cost.layer_flops(config.model, config.data.sequence_length)
    return float(sum(layer.both for layer in layers) + cost.head_flops(config.model).both)


def curve(study: Study, setting: Setting, seeds: Sequence[int]) -> Curve:
    """Return the validation loss by tokens, the mean over seeds."""
    runs = [
        {int(record["tokens"]): record["validation_loss"] for record in study.validations(setting.name, seed)}
        for seed in seeds
    ]
    return [
        (tokens, statistics.fmean(one[tokens] for one in runs)) for tokens in sorted(set.intersection(*map(set, runs)))
    ]


def loss_at(points: Curve, tokens: float) -> float:
    """Return the loss after some tokens, between two points of a curve in proportion; after its end, its last loss; before it, nan."""
    if tokens < points[0][0]:
        return math.nan
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if before <= tokens <= after:
            return high + (low - high) * (tokens - before) / (after - before)
    return points[-1][1]


def difference(losses: Sequence[float], others: Sequence[float], comparisons: int) -> str:
    """Return the mean of the paired differences with its interval, and whether its sign is resolved."""
    pairs = [a - b for a, b in zip(losses, others, strict=True)]
    if not any(pairs):
        return ""
    low, high = mean_interval(pairs, comparisons)
    verdict = "better" if high < 0 else "worse" if low > 0 else "not resolved"
    return f"{statistics.fmean(pairs):+.4f} [{low:+.4f}, {high:+.4f}] {verdict}"


def sweep_table(sweep: Sweep) -> str:
    """Return the validation losses of a sweep, as far as runs have ended; what is chosen for a model is bold."""
    study, seed = sweep.study, sweep.seed
    losses = {one: loss for one in sweep.settings() if (loss := study.validation(one.name, seed)) is not None}
    lrs = sorted({one.lr for one in losses})
    rows = dict.fromkeys((one.model, one.router_multiple, one.shape) for one in losses)
    chosen = {
        sweep.best([one for one in losses if (one.model, one.shape) == (model, shape)]) for model, _, shape in rows
    }

    def cell(setting: Setting) -> str:
        if setting not in losses:
            return ""
        if math.isnan(losses[setting]):
            return "nan"
        bold = "**" if setting in chosen else ""
        return f"{bold}{losses[setting]:.4f}{bold}{', spike' if sweep.has_spike(setting) else ''}"

    lines = [f"| model, routers' multiple | {' | '.join(f'{lr:g}' for lr in lrs)} |", f"|---{'|---' * len(lrs)}|"]
    for model, multiple, shape in rows:
        size = " × ".join(override.partition("=")[2] for override in shape[:2])  # layers × hidden size
        name = f"{model} {size}".rstrip()
        cells = " | ".join(cell(Setting(model, lr, multiple, shape)) for lr in lrs)
        lines.append(f"| {name}, {multiple:g} | {cells} |")
    return "\n".join(lines) + "\n"


def spread_table(study: Study, settings: Sequence[Setting]) -> str:
    """Return how much seeds differ at each learning rate."""
    lines = [
        "| optimizer | warm-up, steps | tokens | learning rate | seeds | validation loss | standard deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in settings:
        losses = [loss for seed in study.seeds if (loss := study.validation(one.name, seed)) is not None]
        if len(losses) > 1:
            config = study.model(one.name)
            tokens = config.train.steps * config.train.global_batch_size * config.data.sequence_length
            lines.append(
                f"| {config.optimizer.name} | {config.optimizer.warmup_steps} | {tokens:,} | {one.lr:g} | {len(losses)} | "
                f"{statistics.fmean(losses):.4f} | {statistics.stdev(losses):.4f} |"
            )
    return "\n".join(lines) + "\n"


def draw(study: Study, chosen: dict[str, Setting], seeds: Sequence[int]) -> None:
    """Draw validation loss against FLOPs, as means over seeds: the whole curves, and their ends enlarged."""
    if (pyplot := plotting()) is None:
        return
    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(12, 5))
    for name, one in chosen.items():
        each = flops(study.model(one.name))
        points = [(tokens * each, loss) for tokens, loss in curve(study, one, seeds)]
        whole.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
        end.plot(*zip(*points[-3:], strict=True), "o-", markersize=4)
    for axes in (whole, end):
        axes.set_xlabel("model FLOPs")
        axes.grid(alpha=0.3)
    whole.set_ylabel("validation loss, nats per token")
    end.set_title("the last three points")
    whole.legend(fontsize=8)
    figure.tight_layout()
    path = study.output / "depth.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
