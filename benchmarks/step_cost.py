"""Measure a training step of LIMe beside LLaMA's, in one process: time and peak memory, by history policy.

A step is forward, loss and backward; gradients are set to None between steps, and no optimizer runs. Each round runs
every variant once, in rotated order; the first round warms up and is dropped. A time ratio is the median over rounds
of (variant's time / LLaMA's time in the same round). Memory is the peak of live tensor bytes during one step, including
parameters, gradients and activations, measured in a separate pass.

examples:
  python benchmarks/step_cost.py --output runs/step_cost
  python benchmarks/step_cost.py --output runs/step_cost_hidden --layers 32 --kv-heads 8 --variants full hidden-full
  python benchmarks/step_cost.py --output runs/step_cost_h100 --device cuda --dtype bf16 --batch 16 --length 2048
  python benchmarks/step_cost.py --output /tmp/toy --layers 4 --hidden 32 --heads 4 --kv-heads 4 2 --length 32

A pair of layers and K/V heads that is in results.json of --output is not measured again, so after a stop the
same command finishes the rest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from copying import check_equality, copied_bytes, copying_logits, random_batch
from results import read_results, write, write_results
from training_step import Subject, step_peak_bytes, step_seconds

from lime_dist import build_decoder, load_config
from lime_dist.config.schema import Checkpointing, ModelConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import BASELINE, architecture_of
from lime_dist.model.cost import head_flops, layer_flops
from lime_dist.model.decoder import Decoder
from lime_dist.paths import user_path

CHUNKED = "model.lime.history={policy: chunked, chunk_size: 16, rank: 2, first: 2}"
MODA = "model.lime.depth_attention=moda"
VARIANTS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "copying": [],
    "full": [],
    "first_last": ["model.lime.history={policy: first_last, first: 2, last: 1}"],
    "chunked": [CHUNKED],
    "dilated": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
    "hidden-full": ["model.lime.routes=hidden"],
    "hidden-chunked": ["model.lime.routes=hidden", CHUNKED],
    "moda": [MODA],
    "moda-mlp": [MODA, "model.lime.mlp_entries=true"],
    "moda-chunked": [MODA, CHUNKED],
    "hyper": ["model.architecture=hyper", "model.hyper.rate=4", "model.hyper.dynamic=true"],
    "doubly_stochastic": ["model.architecture=hyper", "model.hyper.connection=doubly_stochastic"],
    "permutations": ["model.architecture=hyper", "model.hyper.connection=permutations"],
    "gated_residual": ["model.architecture=gated_residual"],
    "value_residual": ["model.architecture=value_residual"],
    "attention_residuals": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=8"],
    "attention_residuals-full": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=1"],
}
RECOMPUTED: dict[str, tuple[str, Checkpointing]] = {
    "llama-selective": ("llama", "selective"),
    "llama-recomputed": ("llama", True),
    "full-selective": ("full", "selective"),
    "full-recomputed": ("full", True),
}
"""Variants that compute activations again in backward: of which variant, and ``parallel.activation_checkpointing``."""
DEFAULT = ["llama", "copying", "full", "first_last", "chunked", "dilated", "hyper"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GB = 1e9

Result = dict[str, Any]
"""Results of one variant: ``seconds`` by round and ``peak_bytes``, or the reason why it is ``left_out``; of copying, ``predicted_bytes``."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--layers", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[8, 2])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=[*VARIANTS, *RECOMPUTED], metavar="VARIANT",
                        help=f"of {', '.join([*VARIANTS, *RECOMPUTED])}; llama always runs")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument(
        "--checkpointing", action="store_true", help="keep only each layer's input for the backward pass"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, metavar="GB",
                        help="memory that copying may use (default: nine tenths of what is free)")  # fmt: skip
    arguments = parser.parse_args()
    arguments.variants = [name for name in (*VARIANTS, *RECOMPUTED) if name in {BASELINE, *arguments.variants}]
    return arguments


def main() -> None:
    arguments = parse()
    for name in ("batch", "length", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise LimeError(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise LimeError("--device cuda: torch finds no GPU here; leave the option out to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    groups = [(layers, heads) for layers in arguments.layers for heads in arguments.kv_heads]
    for layers, heads in groups:
        for name in arguments.variants:
            model_config(arguments, layers, heads, name)  # report mistakes before anything is measured
    left_out = ("output", "layers", "kv_heads", "memory_limit")
    settings = {key: value for key, value in vars(arguments).items() if key not in left_out}
    results = read_results(arguments.output, settings)
    print(check_equality(), flush=True)
    for layers, heads in groups:
        if group_name(layers, heads) in results:
            say(f"{group_name(layers, heads)}: already measured")
            continue
        results[group_name(layers, heads)] = measure(arguments, layers, heads)
        for name, result in results[group_name(layers, heads)].items():
            config = model_config(arguments, layers, heads, name)
            result["flops"] = (
                None if config is None else step_flops(config, arguments.length, checkpointing(arguments, name))
            )
        write_results(arguments.output, settings, results)
    table = make_table(arguments.variants, results)
    write(arguments.output / "table.md", table)
    print(table)


def group_name(layers: int, heads: int) -> str:
    return f"{layers} layers, G {heads}"


def model_config(arguments: argparse.Namespace, layers: int, heads: int, name: str) -> ModelConfig | None:
    """Return the configuration, or None if the variant cannot have this number of K/V heads."""
    overrides = VARIANTS[RECOMPUTED[name][0] if name in RECOMPUTED else name]
    if "model.lime.routes=hidden" in overrides and heads != arguments.heads:
        return None
    shape = {
        "vocab_size": arguments.vocabulary, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
        "num_hidden_layers": layers, "num_attention_heads": arguments.heads, "num_key_value_heads": heads,
    }  # fmt: skip
    return load_config(None, [*(f"model.{key}={value}" for key, value in shape.items()), *overrides]).model


def checkpointing(arguments: argparse.Namespace, name: str) -> Checkpointing:
    return RECOMPUTED[name][1] if name in RECOMPUTED else arguments.checkpointing


def step_flops(config: ModelConfig, length: int, recomputed: Checkpointing = False) -> float:
    """Return the FLOPs of a step's matrix products per token, by formula, with those that backward computes again."""
    layers = layer_flops(config, length)
    again = {
        False: 0.0,
        True: sum(flops.forward for flops in layers),
        "selective": len(layers) * architecture_of(config).feed_forward_flops(defers_weights=False),
    }
    return sum(flops.both for flops in layers) + head_flops(config).both + again[recomputed]


def say(text: str, end: str = "\n") -> None:
    print(text, file=sys.stderr, end=end, flush=True)


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, layers: int, heads: int) -> dict[str, Result]:
    """Measure one group: first the peak memory of every variant, then the rounds."""
    say(f"{group_name(layers, heads)}: building {len(arguments.variants)} variants")
    subjects, results = build_subjects(arguments, layers, heads)
    batch = random_batch(arguments.batch, arguments.length, arguments.vocabulary, arguments.device)
    for name, subject in list(subjects.items()):
        say(f"{group_name(layers, heads)}: memory of {name}")
        if name == "copying":
            needed = results["llama"]["peak_bytes"] + copied_bytes(
                subject.decoder.config, batch[0].numel(), DTYPES[arguments.dtype], arguments.checkpointing
            )
            results[name] = {"predicted_bytes": needed}
            if needed > memory_limit(arguments):
                results[name]["left_out"] = f"does not fit: needs about {needed / GB:.0f} GB"
                del subjects[name]
                continue
        results.setdefault(name, {})["peak_bytes"] = step_peak_bytes(subject, batch)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(arguments.repeats + 1):
        say(f"{group_name(layers, heads)}: round {turn} of {arguments.repeats}, seconds:", end="")
        names = list(subjects)
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            say(f" {name}", end="")
            taken = step_seconds(subjects[name], batch)
            say(f" {taken:.2f}", end="")
            if turn > 0:
                seconds[name].append(taken)
        say("")
    return {name: results[name] | ({"seconds": seconds[name]} if name in seconds else {}) for name in results}


def build_subjects(
    arguments: argparse.Namespace, layers: int, heads: int
) -> tuple[dict[str, Subject], dict[str, Result]]:
    """Return the variants that can run, and results for those that cannot. Variants of one model share its parameters."""
    decoders: dict[str, Decoder] = {}
    subjects: dict[str, Subject] = {}
    results: dict[str, Result] = {}
    for name in arguments.variants:
        config = model_config(arguments, layers, heads, name)
        if config is None:
            results[name] = {"left_out": "needs G = heads"}
            continue
        key = f"{config!r} {checkpointing(arguments, name)}"
        if key not in decoders:
            decoders[key] = build_decoder(
                config,
                device=arguments.device,
                dtype=DTYPES[arguments.dtype],
                activation_checkpointing=checkpointing(arguments, name),
            )
        decoder = decoders[key]
        subjects[name] = Subject(decoder, partial(copying_logits, decoder) if name == "copying" else decoder)
    return subjects, results


def memory_limit(arguments: argparse.Namespace) -> float:
    """Return the bytes that a step may need: the given limit, or nine tenths of free memory."""
    if arguments.memory_limit is not None:
        return arguments.memory_limit * GB
    if arguments.device == "cuda":
        return 0.9 * torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 0.9 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


# -- the table ------------------------------------------------------------------------------------------------------------


def make_table(variants: Sequence[str], groups: dict[str, dict[str, Result]]) -> str:
    """Return the ratios of time, memory and FLOPs by variant and group; LLaMA's row has seconds and GB (1e9 bytes)."""
    lines = [f"| | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for name in variants:
        cells = [cell(results[name], results["llama"], name == BASELINE) for results in groups.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Cells: time / peak memory / FLOPs of matrix products (by formula), each over LLaMA's."]
    formula = [
        f"{group}: {results['copying']['predicted_bytes'] / GB:.2f} for {results['copying']['peak_bytes'] / GB:.2f}"
        for group, results in groups.items()
        if "peak_bytes" in results.get("copying", {})
    ]
    if "copying" in variants:
        measured = "; ".join(formula) or "it was not measured"
        lines.append(
            "Where copying does not fit, its need is computed: LLaMA's measured peak plus the copies. Where it was measured, "
            f"the formula gives, in GB: {measured}."
        )
    return "\n".join(lines) + "\n"


def cell(result: Result, base: Result, is_base: bool) -> str:
    if "left_out" in result:
        return result["left_out"]
    if is_base:
        return f"{statistics.median(result['seconds']):.2f} s / {result['peak_bytes'] / GB:.2f} GB"
    ratio = statistics.median(own / llama for own, llama in zip(result["seconds"], base["seconds"], strict=True))
    return f"{ratio:.2f} / {result['peak_bytes'] / base['peak_bytes']:.2f} / {result['flops'] / base['flops']:.2f}"


if __name__ == "__main__":
    run_command(main)
