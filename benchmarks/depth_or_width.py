"""Depth against width at equal parameters: train shallow and wide, and deep and narrow models, of LLaMA and of LIMe.

The size of heads is that of `depth.py`; the hidden size falls with depth, and the size of the SwiGLU makes up for what is left of the
difference in parameters. Learning rates are chosen for every model and depth as in `depth.py`; seeds and data are the same for all.

    python benchmarks/depth_or_width.py --data data/quickstart/shards --output runs/depth --jobs 2
    python benchmarks/depth_or_width.py --data … --output … --depths 12 24 48 96 --models llama lime-full
    python benchmarks/depth_or_width.py --output runs/depth --runs benchmarks/depth.jsonl    (the table of RESULTS.md; trains nothing)

Resumable, and shares the runs of `depth.py` in the same --output or --runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from depth import add_study_options, choose, finished, make_sweep, report
from depth_table import difference, flops
from memories import BASE, MODELS, Setting
from pairs import mean_and_spread
from runs import Study

from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.cost import count_parameters

STEP = 2
"""Sizes of SwiGLUs are multiples of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument("--models", nargs="+", default=[BASE, "lime-first_last"], choices=sorted(MODELS),
                        metavar="MODEL", help=f"of {', '.join(sorted(MODELS))}")  # fmt: skip
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 24, 48], help="layers")
    arguments = parser.parse_args()
    base = make_sweep(arguments, [(BASE, ())]).study
    middle = replace(base, variants={BASE: MODELS[BASE]}).model(BASE).model
    shapes = {layers: shape(middle, layers) for layers in arguments.depths}
    sweep = make_sweep(arguments, [(name, each) for name in arguments.models for each in shapes.values()])
    chosen = choose(sweep, arguments, "depth_or_width_sweep.md")
    study = replace(sweep.study, seeds=arguments.seeds, variants={one.name: one.overrides for one in chosen})
    study.run(arguments.jobs)
    report(study, make_table(study, chosen, finished(study)), "depth_or_width.md")


def shape(middle: ModelConfig, layers: int) -> tuple[str, ...]:
    """Return the overrides that give a LLaMA of so many layers the parameters of another, as nearly as sizes allow.

    Raises:
        LimeError: there are no layers, or no SwiGLU is left at this depth.
    """
    if layers < 1:
        raise LimeError(f"--depths {layers} must be at least 1")
    if layers == middle.num_hidden_layers:
        return ()
    head = middle.hidden_size // middle.num_attention_heads
    ideal = middle.hidden_size * (middle.num_hidden_layers / layers) ** 0.5
    heads = max(1, round(ideal / head))

    def candidate(intermediate: int) -> ModelConfig:
        return middle.model_copy(
            update={
                "num_hidden_layers": layers, "hidden_size": heads * head, "num_attention_heads": heads,
                "num_key_value_heads": heads, "intermediate_size": intermediate,
            }
        )  # fmt: skip

    target, least = count_parameters(middle), count_parameters(candidate(0))
    each = (count_parameters(candidate(STEP)) - least) / STEP
    best = STEP * round((target - least) / each / STEP)
    if best < STEP:
        raise LimeError(f"--depths {layers}: no size of the SwiGLU gives {target:,} parameters")
    sized = candidate(best)
    return tuple(
        f"model.{key}={getattr(sized, key)}"
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
        )
    )


def make_table(study: Study, chosen: Sequence[Setting], seeds: Sequence[int]) -> str:
    """Return the table: each model and depth, with differences paired by seed to the first depth and to the first model."""
    losses = {(one.model, one.shape): study.losses(one.name, seeds) for one in chosen}
    first_model, first_shape = chosen[0].model, chosen[0].shape
    count = sum((one.shape != first_shape) + (one.model != first_model) for one in chosen)
    base = study.model(chosen[0].name)
    lines = [
        f"| model | layers × hidden size, SwiGLU | learning rate, routers' | validation loss, {len(seeds)} seeds | minus the first depth's | "
        f"minus {first_model}'s at this depth | parameters | FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in chosen:
        config, own = study.model(one.name), losses[one.model, one.shape]
        model = config.model
        lines.append(
            f"| {one.model} | {model.num_hidden_layers} × {model.hidden_size}, {model.intermediate_size} | {one.lr:g}, "
            f"{one.lr * one.router_multiple:g} | {mean_and_spread(own)} | {difference(own, losses[one.model, first_shape], count)} | "
            f"{difference(own, losses[first_model, one.shape], count)} | {count_parameters(model):,} | {flops(config) / flops(base):.3f} |"
        )
    return (
        "\n".join(lines) + f"\n\nIntervals hold for all {count} comparisons together with 95 % (Student, Bonferroni).\n"
    )


if __name__ == "__main__":
    run_command(main)
