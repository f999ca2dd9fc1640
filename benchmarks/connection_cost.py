"""What residual streams and value residual cost, by formula: parameters, FLOPs, activations and transferred bytes beside LLaMA's.

example:
  python benchmarks/connection_cost.py --hidden 2048 --heads 16 --kv-heads 4 --length 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from step_cost import VARIANTS

from lime_dist import load_config
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import run_command
from lime_dist.model import cost

NAMES = ("value_residual", "hyper", "doubly_stochastic", "permutations", "gated_residual")
BF16 = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    arguments = parser.parse_args()
    shape = {
        "vocab_size": arguments.vocabulary, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
        "num_hidden_layers": arguments.layers, "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
    }  # fmt: skip
    base, *others = [
        load_config(None, [*(f"model.{key}={value}" for key, value in shape.items()), *VARIANTS[name]]).model
        for name in ("llama", *NAMES)
    ]
    print("| | parameters | FLOPs | activations | bytes per token over a boundary, bf16 |\n|---|---|---|---|---|")
    for name, config in zip(NAMES, others, strict=True):
        ratios = [
            f"{of(config) / of(base):.3f}" for of in (cost.count_parameters, flops_of_a_step(arguments.length), kept)
        ]
        sent, plain = (cost.payload_bytes(each, arguments.layers // 2, 1, BF16) for each in (config, base))
        print(f"| {name} | {' | '.join(ratios)} | {sent:,} for {plain:,} ({sent / plain:.2f}) |")


def flops_of_a_step(length: int) -> Callable[[ModelConfig], float]:
    """Return the function that counts the FLOPs of matrix products per token of a step."""

    def flops(config: ModelConfig) -> float:
        return sum(layer.both for layer in cost.layer_flops(config, length)) + cost.head_flops(config).both

    return flops


def kept(config: ModelConfig) -> float:
    """Return the bytes that the layers keep for backward per token, in bf16 without checkpointing, with the history."""
    layers = range(config.num_hidden_layers)
    activations = sum(cost.activation_bytes(config, layer, 1024, BF16, False) for layer in layers)
    return (activations + cost.history_bytes(config, layers, 1024, BF16)) / 1024


if __name__ == "__main__":
    run_command(main)
