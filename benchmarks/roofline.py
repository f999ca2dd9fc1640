"""Estimate by roofline what a decoder layer's training step costs on a GPU, by architecture, history policy, depth and K/V heads.

No GPU is needed. The decoder layers run forward and backward with real shapes on torch's meta device, which computes nothing. Every
operation that really runs is one kernel. It takes as long as its bytes take at the GPU's memory bandwidth, or its FLOPs at the
rate of its type, whichever is longer; starting it takes no time. Attention and RMSNorm are one kernel each, as on a GPU. Embedding,
output projection, loss and optimizer are left out. These are lower bounds to compare variants by, not measurements. The column
"fused" is the time in which kernels could move what a history of keys and values has to move (fused_history.py).

examples:
  python benchmarks/roofline.py --output runs/roofline
  python benchmarks/roofline.py --output runs/roofline_full --layers 64 --kv-heads 16 --variants full chunked-8
  python benchmarks/roofline.py --output runs/roofline_paper --configs configs/paper/*.yaml
  python benchmarks/roofline.py --output runs/roofline_a100 --gpu a100 --layers 32
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fused_history import fused_history_bytes
from kernels import GPUS, PARTS, Gpu, Kernel, step_kernels
from results import write
from step_cost import DTYPES
from step_cost import VARIANTS as MEASURED

from lime_dist import load_config
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import BASELINE
from lime_dist.model.architectures.lime.hidden import token_slices
from lime_dist.paths import user_path

VARIANTS: dict[str, list[str]] = {
    **{name: overrides for name, overrides in MEASURED.items() if name != "copying"},
    "chunked-8": ["model.lime.history={policy: chunked, chunk_size: 8, rank: 2, first: 2}"],
    "hidden-dynamic": ["model.lime.routes=hidden", "model.lime.router=dynamic"],
}
DEFAULT = ["llama", "first_last", "chunked-8", "full"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--layers", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=list(VARIANTS), metavar="VARIANT",
                        help=f"of {', '.join(VARIANTS)}; llama always runs")  # fmt: skip
    parser.add_argument("--configs", nargs="+", type=user_path, metavar="FILE",
                        help="the models of these configurations instead; ratios are to the first with model.architecture: llama")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--checkpointing", action="store_true", help="keep only each layer's input for the backward pass"
    )
    parser.add_argument("--slice-elements", type=int, default=token_slices.SLICE_ELEMENTS_GPU, metavar="COUNT",
                        help="elements of a mixture of hidden states that are computed at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--operations", type=int, default=0, metavar="COUNT",
                        help="also list the COUNT longest operations of every variant")  # fmt: skip
    arguments = parser.parse_args()
    arguments.variants = [name for name in VARIANTS if name in {BASELINE, *arguments.variants}]
    return arguments


def main() -> None:
    arguments = parse()
    for name in ("batch", "length", "slice_elements"):
        if getattr(arguments, name) < 1:
            raise LimeError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    token_slices.SLICE_ELEMENTS_GPU = arguments.slice_elements
    groups = config_groups(arguments) if arguments.configs else variant_groups(arguments)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LimeError(f"--output {arguments.output}: {error.strerror}; give another folder") from None
    results: dict[str, dict[str, Estimate]] = {}
    for group, configs in groups.items():
        results[group] = {}
        for name, config in configs.items():
            print(f"{group}: {name}", file=sys.stderr, flush=True)
            kernels = step_kernels(
                config, arguments.batch, arguments.length, DTYPES[arguments.dtype], arguments.checkpointing
            )
            fused = fused_history_bytes(config, arguments.batch * arguments.length, DTYPES[arguments.dtype].itemsize)
            results[group][name] = estimate(kernels, fused, GPUS[arguments.gpu], config.num_hidden_layers)
    table = make_table(results, arguments.operations)
    write(arguments.output / "table.md", table)
    print(table)


Groups = dict[str, dict[str, ModelConfig]]
"""Models that are compared with one LLaMA, by name of the group and name of the variant."""


def variant_groups(arguments: argparse.Namespace) -> Groups:
    groups: Groups = {}
    for layers in arguments.layers:
        for kv_heads in arguments.kv_heads:
            configs = groups.setdefault(f"{layers} layers, G {kv_heads}", {})
            for name in arguments.variants:
                if "model.lime.routes=hidden" in VARIANTS[name] and kv_heads != arguments.heads:
                    continue  # hidden routes need as many K/V heads as query heads
                shape = {
                    "vocab_size": 1024, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
                    "num_hidden_layers": layers, "num_attention_heads": arguments.heads, "num_key_value_heads": kv_heads,
                }  # fmt: skip
                overrides = [*(f"model.{key}={value}" for key, value in shape.items()), *VARIANTS[name]]
                configs[name] = load_config(None, overrides).model
    return groups


def config_groups(arguments: argparse.Namespace) -> Groups:
    configs = {path.stem: load_config(path, []).model for path in arguments.configs}
    names = sorted(configs, key=lambda name: configs[name].architecture != BASELINE)
    if configs[names[0]].architecture != BASELINE:
        raise LimeError("--configs needs a configuration with model.architecture: llama, to compare the others with")
    return {"configurations": {name: configs[name] for name in names}}


# -- the table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Per layer: seconds by part and by operation of a part, bytes and kernels; ``fused``: seconds of the history if it moved
    only what it must."""

    seconds: dict[str, float]
    operations: dict[tuple[str, str], float]
    nbytes: float
    kernels: float
    fused: float | None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def estimate(kernels: Sequence[Kernel], fused: int | None, gpu: Gpu, layers: int) -> Estimate:
    seconds = dict.fromkeys(PARTS, 0.0)
    operations: defaultdict[tuple[str, str], float] = defaultdict(float)
    for kernel in kernels:
        seconds[kernel.part] += kernel.seconds(gpu) / layers
        operations[kernel.part, kernel.name] += kernel.seconds(gpu) / layers
    least = None if fused is None else fused / gpu.bandwidth / layers
    return Estimate(
        seconds, operations, sum(kernel.nbytes for kernel in kernels) / layers, len(kernels) / layers, least
    )


def make_table(groups: dict[str, dict[str, Estimate]], num_operations: int) -> str:
    """Milliseconds a layer by part, and ratios to LLaMA's total; fused is what kernels could not go below for the history of keys
    and values (`fused_history.py`)."""
    names = [*PARTS, "fused", "ms a layer", "over LLaMA", "GB a layer", "kernels a layer"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    listed: list[str] = []
    for group, estimates in groups.items():
        base = next(iter(estimates.values())).total
        for name, result in estimates.items():
            parts = " | ".join(f"{1e3 * result.seconds[part]:.2f}" for part in PARTS)
            fused = "" if result.fused is None else f"{1e3 * result.fused:.2f}"
            ratio = "" if result.total == base else f"{result.total / base - 1:+.1%}"
            lines.append(
                f"| {group}: {name} | {parts} | {fused} | {1e3 * result.total:.2f} | {ratio} | {result.nbytes / 1e9:.1f} | "
                f"{result.kernels:.0f} |"
            )
            longest = sorted(result.operations.items(), key=lambda item: -item[1])
            for (part, operation), seconds in longest[:num_operations]:
                listed.append(f"{group}: {name}: {part}, {operation}: {1e6 * seconds:.0f} us a layer")
    return "\n".join([*lines, *([""] if listed else []), *listed]) + "\n"


if __name__ == "__main__":
    run_command(main)
