"""Train a deep model for a few steps from its initial values, in one process, and report whether it diverges.

Loss and gradient norm by step; AdamW with β 0.9/0.95, clipping at 1, a warm-up of 5 steps, float32 master weights. Text is made up:
each token is followed by one of four, so there is something to learn at once.

examples:
  python benchmarks/depth_stability.py --layers 128 --dtype bf16
  python benchmarks/depth_stability.py --layers 32 --hidden 768 --steps 3 --models llama attention_residuals
  python benchmarks/depth_stability.py --layers 4 --hidden 32 --heads 4 --length 16 --steps 2
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lime_dist import build_decoder, load_config
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import architecture_of
from lime_dist.model.layers import language_model_loss

MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "moda": ["model.lime.depth_attention=moda", "model.lime.mlp_entries=true"],
    "attention_residuals-full": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=1"],
    "attention_residuals": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=8"],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP_STEPS, FOLLOWERS = 5, 4


@dataclass
class Course:
    """Loss and norm of the gradient before clipping, by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def text(vocabulary: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return tokens [batch, length + 1], each one of the `FOLLOWERS` followers of the token before."""
    tokens = [torch.randint(vocabulary, (batch,), generator=generator)]
    for _ in range(length):
        choice = torch.randint(FOLLOWERS, (batch,), generator=generator)
        tokens.append((7 * tokens[-1] + 11 * choice + 3) % vocabulary)
    return torch.stack(tokens, 1)


def train(config: ModelConfig, dtype: torch.dtype, steps: int, batch: int, length: int, lr: float = 1e-3) -> Course:
    """Train ``config`` from its initial values."""
    model = build_decoder(config, dtype=dtype)
    group_of = architecture_of(config).parameter_group
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
    decay = {name: 0.1 if group_of(name) == "matrices" else 0.0 for name in masters}
    groups = [{"params": [master], "weight_decay": decay[name]} for name, master in masters.items()]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    generator, course = torch.Generator().manual_seed(0), Course()
    for _ in range(steps):
        tokens = text(config.vocab_size, batch, length, generator)
        loss = language_model_loss(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        course.losses.append(loss.item())
        course.norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)))
        adam.step()
        schedule.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name].data)
    return course


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.steps < 1:
        raise LimeError(f"--steps {arguments.steps} must be at least 1")
    print("| model | loss, first | highest | last | gradient norm, first | highest | |\n|---|---|---|---|---|---|---|")
    for name in arguments.models:
        shape = {
            "num_hidden_layers": arguments.layers, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
            "num_attention_heads": arguments.heads, "vocab_size": arguments.vocabulary,
        }  # fmt: skip
        config = load_config(None, [*(f"model.{key}={value}" for key, value in shape.items()), *MODELS[name]]).model
        course = train(config, DTYPES[arguments.dtype], arguments.steps, arguments.batch, arguments.length)
        finite = all(map(math.isfinite, course.losses + course.norms))
        figures = (course.losses[0], max(course.losses), course.losses[-1], course.norms[0], max(course.norms))
        cells = " | ".join(f"{figure:.3f}" for figure in figures)
        print(f"| {name} | {cells} | {'finite' if finite else 'not finite'} |", flush=True)


if __name__ == "__main__":
    run_command(main)
