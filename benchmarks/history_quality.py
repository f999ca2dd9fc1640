"""Measure what a bounded history costs in quality: validation loss against entries over the last boundary, by policy.

Every variant trains from the same seeds (for initial values and order of the data) for the same steps, and is compared seed by
seed with `full` and with LLaMA. The last boundary lies before the last quarter of the layers, as with four equal stages.

    python benchmarks/history_quality.py --data data/quickstart/shards --output runs/history_quality
    python benchmarks/history_quality.py --data … --output … --seeds 0 1 2 3 4 --variants llama full chunked-8-r1-f2
    python benchmarks/history_quality.py --data … --output … --minutes 30                (start no runs after that)

Resumable: after a stop, the same command finishes the rest (`runs.py`). Seeds that some variant has not finished are left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from pairs import mean_interval, ratio_interval
from results import plotting
from runs import Study, add_options

from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import BASELINE
from lime_dist.model.cost import boundary_entries

SIZE = [
    "model.hidden_size=64", "model.intermediate_size=192", "model.num_hidden_layers=32", "model.num_attention_heads=4",
    "data.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8", "parallel.pipeline_stages=1",
    "train.evaluation_interval=0", "train.evaluation_samples=400", "train.log_interval=100", "train.checkpoint_interval=200",
]  # fmt: skip
"""The settings behind the table in RESULTS.md; overrides of the command line follow."""


def chunked(chunk_size: int, rank: int, first: int) -> str:
    return f"model.lime.history={{policy: chunked, chunk_size: {chunk_size}, rank: {rank}, first: {first}}}"


def first_last(first: int, last: int) -> str:
    return f"model.lime.history={{policy: first_last, first: {first}, last: {last}}}"


IDENTITY, SLOW, FAST = "model.lime.router_init=identity", "optimizer.router_lr=3.0e-3", "optimizer.router_lr=3.0e-2"
VARIANTS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "full": [],
    "full-identity": [IDENTITY],
    "full-slow": [SLOW],
    "full-fast": [FAST],
    "first_last-2-1": [first_last(2, 1)],
    "first_last-2-1-identity": [first_last(2, 1), IDENTITY],
    "first_last-4-1": [first_last(4, 1)],
    "chunked-4-r1-f2": [chunked(4, 1, 2)],
    "chunked-4-r2-f2": [chunked(4, 2, 2)],
    "chunked-8-r1-f1": [chunked(8, 1, 1)],
    "chunked-8-r1-f2": [chunked(8, 1, 2)],
    "chunked-8-r1-f4": [chunked(8, 1, 4)],
    "chunked-8-r2-f2": [chunked(8, 2, 2)],
    "chunked-8-r1-f2-identity": [chunked(8, 1, 2), IDENTITY],
    "chunked-8-r1-f2-slow": [chunked(8, 1, 2), SLOW],
    "chunked-8-r1-f2-fast": [chunked(8, 1, 2), FAST],
    "chunked-8-r1-f2-identity-fast": [chunked(8, 1, 2), IDENTITY, FAST],
    "dilated-4-1-1": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
}
"""identity: `router_init: identity`; slow and fast: routers at 0.3 and 3 times the learning rate of the configuration."""
DEFAULT = [
    "llama", "full", "chunked-8-r1-f2", "first_last-2-1", "full-identity", "chunked-8-r1-f2-identity", "chunked-4-r1-f2",
    "first_last-2-1-identity", "dilated-4-1-1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=400)
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=sorted(VARIANTS), metavar="VARIANT",
                        help=f"of {', '.join(VARIANTS)}; llama and full always run")  # fmt: skip
    arguments = parser.parse_args()
    names = dict.fromkeys(["llama", "full", *arguments.variants])
    study = Study.from_options(arguments, SIZE, {name: VARIANTS[name] for name in names})
    study.run(arguments.jobs, arguments.minutes)
    seeds = study.finished_seeds()
    if len(seeds) < 2:
        raise LimeError(
            f"{len(seeds)} seeds are finished for every variant, and an interval needs 2; run the same command again"
        )
    table = make_table(study, seeds)
    (study.output / "table.md").write_text(table)
    print(table)
    draw(study, seeds)


def entries(study: Study, name: str) -> int:
    """Return the number of entries over the boundary before the last quarter of the layers."""
    model = study.model(name).model
    return boundary_entries(model, model.num_hidden_layers - model.num_hidden_layers // 4)


def make_table(study: Study, seeds: Sequence[int]) -> str:
    """Return the table by variant: entries, loss, difference from `full` and share of its gain over LLaMA, with 95 % intervals."""
    llama, full = study.losses("llama", seeds), study.losses("full", seeds)
    gains = [a - b for a, b in zip(llama, full, strict=True)]
    lines = [
        f"| variant | entries | validation loss, {len(seeds)} seeds | minus full's | of full's gain | against full |",
        "|---|---|---|---|---|---|",
    ]
    for name in study.variants:
        losses = study.losses(name, seeds)
        cells = [name, str(entries(study, name)), f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"]
        if name == "full":
            cells += ["", "1", ""]
        else:
            difference = [a - b for a, b in zip(losses, full, strict=True)]
            low, high = mean_interval(difference)
            own_gains = [a - b for a, b in zip(llama, losses, strict=True)]
            verdict = "better" if high < 0 else "worse" if low > 0 else "unresolved"
            cells += [f"{statistics.fmean(difference):+.4f} [{low:+.4f}, {high:+.4f}]"]
            cells += ["0" if name == BASELINE else share(own_gains, gains), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def share(gains: Sequence[float], of: Sequence[float]) -> str:
    """Return the ratio of the mean gains, with its interval if it is bounded."""
    interval = ratio_interval(gains, of)
    if interval is None:
        return "unresolved"
    return f"{statistics.fmean(gains) / statistics.fmean(of):.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def draw(study: Study, seeds: Sequence[int]) -> None:
    """Draw validation loss minus LLaMA's against entries: a small dot per seed, a large one for the mean, a bar for its 95 % interval."""
    if (pyplot := plotting()) is None:
        return
    llama = study.losses("llama", seeds)
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    axes.axhline(0, color="grey", linewidth=1, label="llama")
    for index, name in enumerate(name for name in study.variants if name != BASELINE):
        x = entries(study, name) * (1 + 0.012 * (index % 5 - 2))
        values = [a - b for a, b in zip(study.losses(name, seeds), llama, strict=True)]
        low, high = mean_interval(values)
        mean = statistics.fmean(values)
        marker = "D" if name.startswith("full") else "o"
        bars = axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt=marker, capsize=3, markersize=7, label=name)
        axes.plot([x] * len(values), values, ".", color=bars[0].get_color(), alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("entries over the last boundary")
    axes.set_ylabel("validation loss minus LLaMA's, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path = study.output / "history_quality.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_command(main)
