"""Draw the README's picture: what the layers of a trained LIMe read, and what each history policy costs over depth.

The left panel shows the routers of a run. The right panel shows simulated step times, as crossover.py computes them.

example:
  bash launch/quickstart.sh
  python benchmarks/picture.py --run runs/quickstart --output docs/overview.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crossover import DEPTHS, MICRO_BATCHES_PER_STAGE, PER_STAGE, POLICIES, make_config, simulate_step
from torch import Tensor

from lime_dist.checkpoint.reading import read_weights
from lime_dist.errors import LimeError, run_command
from lime_dist.monitor.routers import has_map, router_map, shares
from lime_dist.paths import user_path
from lime_dist.plan.forecast import Machine

MACHINE = Machine(flops=480e12, memory_bandwidth=3e12, bandwidth=50e9, latency=5e-6)
"""As in crossover.py: a process that reaches 480 TFLOP/s and moves 3 TB/s of memory, with 400 Gbit/s to the next."""
COLOURS = {"full": "#cc3311", "dilated": "#ee8866", "chunked": "#009988", "first_last": "#0077bb"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=user_path, help="run folder of a LIMe with static routers")
    parser.add_argument("--output", required=True, type=user_path, help="PNG file to write")
    arguments = parser.parse_args()
    config, state, weights = read_weights(arguments.run)
    if not has_map(config.model):
        raise LimeError(f"--run {arguments.run} has no static routers; give a run of model.architecture=lime")
    layers = shares(router_map(config.model, weights))
    draw(layers, state.consumed_samples * config.data.sequence_length, step_ratios(), arguments.output)
    print(f"picture: {arguments.output}")


def step_ratios() -> dict[str, list[float]]:
    """Return the step time of each policy over LLaMA's, by depth."""
    seconds = {
        name: [sum(vars(simulate_step(make_config(name, depth, []), MACHINE)).values()) for depth in DEPTHS]
        for name in POLICIES
    }
    return {name: [a / b for a, b in zip(seconds[name], seconds["llama"], strict=True)] for name in COLOURS}


def draw(layers: Tensor, tokens: int, ratios: dict[str, list[float]], path: Path) -> None:
    """Draw both panels.

    Args:
        layers: [L, L]; row: the layer that reads, column: the layer that is read, value: the column's share of what the row reads.
        tokens: number of tokens that the run was trained on.
        ratios: step times over LLaMA's, one for each of `DEPTHS`, by policy.
    """
    try:
        import matplotlib
    except ImportError:
        raise LimeError("matplotlib is not installed: pip install -c constraints.txt -e '.[analysis]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _draw_map(figure, left, layers)
    left.set_title(f"What layers read after {tokens:,} tokens", fontsize=11)
    for name, values in ratios.items():
        right.plot(DEPTHS, values, "o-", color=COLOURS[name], label=name, markersize=4)
    right.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    right.text(DEPTHS[-1], 1.03, "LLaMA", ha="right", va="bottom", fontsize=9, color="#555555")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    ticks = [1, 2, 4, 8, 16]
    right.set_yticks(ticks, [f"{tick}×" for tick in ticks])
    right.minorticks_off()
    right.set_ylim(0.9, 18)
    right.set_xlabel(f"layers ({PER_STAGE} per stage, {MICRO_BATCHES_PER_STAGE} micro-batches per stage)")
    right.set_title("Step time over LLaMA's, simulated at 400 Gbit/s", fontsize=11)
    right.legend(title="history policy", frameon=False, fontsize=9)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_map(figure: Any, axes: Any, layers: Tensor) -> None:
    import numpy as np

    values = np.ma.masked_where(np.triu(np.ones(layers.shape), 1) > 0, layers.numpy())
    image = axes.imshow(
        100 * values, cmap="YlGnBu", vmin=0, vmax=100 * min(1.0, float(np.percentile(values.compressed(), 95)))
    )
    figure.colorbar(image, ax=axes, extend="max", label="share of the router's weight, %", shrink=0.9)
    axes.set_xticks(axes.get_yticks()[1:-1])
    axes.set_xlabel("layer that is read")
    axes.set_ylabel("layer that reads")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_command(main)
