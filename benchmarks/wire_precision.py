"""Measure what rounding at stage boundaries does to gradients: entries and their gradients in bf16 and in float8, in several forms.

    python benchmarks/wire_precision.py --data data/quickstart/shards
    python benchmarks/wire_precision.py model.num_hidden_layers=64 --data … --stages 4 8 --formats "bf16, all" fp8

A decoder is trained in one process, in float32, and its loss is then differentiated once more, on tokens that it has not seen, as
stages would do it (`staged.py`): with nothing rounded, and with payloads rounded in each form. An error is ‖Δ‖/‖g‖ over the
parameters named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from staged import Rounding, as_bf16, staged_logits
from torch import Tensor

from lime_dist import build_decoder, load_config
from lime_dist.config.schema import Config
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.loader import read_batch
from lime_dist.errors import run_command
from lime_dist.model.decoder import Decoder
from lime_dist.model.layers import language_model_loss
from lime_dist.paths import user_path
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.wire import dequantise, quantise

SIZE = [
    "model.hidden_size=128", "model.intermediate_size=344", "model.num_attention_heads=4", "model.num_hidden_layers=32",
    "model.vocab_size=4096", "model.tie_word_embeddings=true", "data.sequence_length=128", "optimizer.lr=2e-3",
]  # fmt: skip
BATCH = 4

Batch = tuple[Tensor, Tensor]
"""Tokens and labels, [B, T]."""
Gradients = dict[str, Tensor]
KINDS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "routers": lambda name: ".router." in name,
    "keys and values": lambda name: "k_proj" in name or "v_proj" in name,
}


def as_sent(part: Tensor, block: int = 128) -> Tensor:
    """As `lime_dist.pipeline.wire` sends it."""
    blocks = part.reshape(-1, block)
    scales = torch.empty(len(blocks), dtype=torch.bfloat16)
    elements = torch.empty(blocks.shape, dtype=torch.float8_e4m3fn)
    quantise(blocks, scales, elements)
    arrived = torch.empty_like(blocks)
    dequantise(scales, elements, arrived)
    return arrived.view(-1)


def with_power_of_two(part: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, block: int = 128) -> Tensor:
    """float8 with a scale that is a power of two."""
    blocks = part.reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    unit = (largest / torch.finfo(dtype).max).log2().ceil().exp2()
    return ((blocks / unit).to(dtype).to(part.dtype) * unit).view(-1)


as_e5m2 = partial(with_power_of_two, dtype=torch.float8_e5m2)

FORMATS: dict[str, tuple[Rounding, Rounding, Rounding]] = {
    "bf16, all": (as_bf16, as_bf16, as_bf16),
    "bf16": (torch.clone, as_bf16, as_bf16),
    "fp8": (torch.clone, as_sent, as_sent),
    "fp8, blocks of 32": (torch.clone, partial(as_sent, block=32), partial(as_sent, block=32)),
    "fp8, scales 2^k": (torch.clone, with_power_of_two, with_power_of_two),
    "fp8, gradients bf16": (torch.clone, as_sent, as_bf16),
    "fp8, gradients e5m2": (torch.clone, as_sent, as_e5m2),
}
"""What happens to hidden states with their gradients, to entries, and to the gradients of entries."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=user_path, help="folder with dataset.json")
    parser.add_argument("--steps", type=int, default=100, help="training steps before the measurement")
    parser.add_argument("--stages", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, [*SIZE, *arguments.overrides])
    model, batch = trained(config, TokenSplit(arguments.data, "train"), arguments.steps)
    print(f"| stages | payloads | loss | {' | '.join(KINDS)} |")
    print(f"|---|---|---|{'---|' * len(KINDS)}")
    for stages in arguments.stages:
        bounds = stage_bounds(load_config(None, [*SIZE, *arguments.overrides, f"parallel.pipeline_stages={stages}"]))
        exact, wanted = differentiate(model, batch, bounds, (torch.clone, torch.clone, torch.clone))
        for name in arguments.formats:
            loss, gradients = differentiate(model, batch, bounds, FORMATS[name])
            errors = (f"{distance(gradients, wanted, kind):.5f}" for kind in KINDS.values())
            print(f"| {stages} | {name} | {loss - exact:+.6f} | {' | '.join(errors)} |", flush=True)


def trained(config: Config, split: TokenSplit, steps: int) -> tuple[Decoder, Batch]:
    """A decoder after so many steps, and the samples that would come next."""
    model, length = build_decoder(config.model, seed=1), config.data.sequence_length
    order = np.random.default_rng(1).permutation(split.num_samples(length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    for step in range(steps + 1):
        batch = read_batch(split, order[step * BATCH : (step + 1) * BATCH], length)
        if step == steps:
            break
        language_model_loss(model(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, batch


def differentiate(
    model: Decoder, batch: Batch, bounds: Sequence[int], rounding: tuple[Rounding, Rounding, Rounding]
) -> tuple[float, Gradients]:
    """Loss and gradients, with payloads rounded at the boundaries."""
    hidden, entries, back = rounding
    logits = staged_logits(model, batch[0], bounds, (hidden, entries, hidden), (hidden, back, hidden))
    loss = language_model_loss(logits, batch[1])
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), {name: gradient.clone() for name, gradient in gradients.items()}


def distance(gradients: Gradients, wanted: Gradients, kind: Callable[[str], bool]) -> float:
    """‖Δ‖/‖g‖ over the parameters of a kind."""
    flat, exact = (
        torch.cat([each[name].flatten().double() for name in wanted if kind(name)]) for each in (gradients, wanted)
    )
    return float((flat - exact).norm() / exact.norm())


if __name__ == "__main__":
    run_command(main)
