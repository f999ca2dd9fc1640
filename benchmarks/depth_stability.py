"""Train deep models for a few steps from their initial values, in one process: does one diverge?

Weights are in --dtype, with float32 masters; optimizer, its groups and clipping are those of the configuration's defaults (AdamW), after
a warm-up of 5 steps. Text is made up: each token is followed by one of four, so there is something to learn at once. A loss
that is more than 0.5 above the first is a spike.

examples:
  python benchmarks/depth_stability.py --output runs/depth_stability
  python benchmarks/depth_stability.py --output runs/divergence --layers 32 --hidden 768 --heads 12 --steps 10 \\
    --models llama attention_residuals attention_residuals-full
  python benchmarks/depth_stability.py --output /tmp/toy --layers 4 --hidden 32 --heads 4 --length 16 --steps 2

A model that is in results.json of --output is not trained again, so after a stop the same command finishes the rest.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from results import read_results, write, write_results
from step_cost import DTYPES, VARIANTS
from torch import Tensor

from lime_dist import build_decoder, load_config
from lime_dist.config.schema import ModelConfig, OptimizerConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import architecture_of
from lime_dist.model.decoder import Decoder
from lime_dist.model.layers import language_model_loss
from lime_dist.paths import user_path

MODELS = {name: overrides for name, overrides in VARIANTS.items() if name != "copying"}
"""Those of step_cost.py; ``copying`` is ``full``, computed in another way."""
WARMUP_STEPS, FOLLOWERS, SPIKE = 5, 4, 0.5


@dataclass
class Course:
    """Loss and norm of the gradient before clipping, by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if not all(map(math.isfinite, self.losses + self.norms)):
            return "not finite"
        return "spike" if max(self.losses) > self.losses[0] + SPIKE else "finite, no spike"


def main() -> None:
    arguments = parse()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "models")}
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise LimeError(f"--{name} {value} must be at least 1")
    shape = {
        "num_hidden_layers": arguments.layers, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
        "num_attention_heads": arguments.heads, "vocab_size": arguments.vocabulary,
    }  # fmt: skip
    common = [f"model.{key}={value}" for key, value in shape.items()]
    configs = {name: load_config(None, [*common, *MODELS[name]]) for name in arguments.models}
    results = read_results(arguments.output, settings)
    for name, config in configs.items():
        if name not in results:
            begin, dtype = time.perf_counter(), DTYPES[arguments.dtype]
            course = train(config.model, config.optimizer, dtype, arguments.steps, arguments.batch, arguments.length)
            results[name] = {**asdict(course), "seconds": time.perf_counter() - begin}
            write_results(arguments.output, settings, results)
        print(row(name, results[name]), flush=True)
    table = make_table(arguments.models, results)
    write(arguments.output / "table.md", table)
    print(f"\n{table}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=64, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}")  # fmt: skip
    return parser.parse_args()


def text(vocabulary: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return tokens [batch, length + 1], each one of the `FOLLOWERS` followers of the token before."""
    tokens = [torch.randint(vocabulary, (batch,), generator=generator)]
    for _ in range(length):
        choice = torch.randint(FOLLOWERS, (batch,), generator=generator)
        tokens.append((7 * tokens[-1] + 11 * choice + 3) % vocabulary)
    return torch.stack(tokens, 1)


def train(
    config: ModelConfig, optimizer: OptimizerConfig, dtype: torch.dtype, steps: int, batch: int, length: int
) -> Course:
    """Train ``config`` from its initial values."""
    decoder = build_decoder(config, dtype=dtype)
    weights = dict(decoder.named_parameters())
    masters = {name: weight.detach().float().clone().requires_grad_() for name, weight in weights.items()}
    adam = make_optimizer(decoder, masters, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    generator, course = torch.Generator().manual_seed(0), Course()
    for _ in range(steps):
        tokens = text(config.vocab_size, batch, length, generator)
        loss = language_model_loss(decoder(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            masters[name].grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), optimizer.max_grad_norm)
        course.losses.append(loss.item())
        course.norms.append(norm.item())
        adam.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
    return course


def make_optimizer(decoder: Decoder, masters: dict[str, Tensor], settings: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the masters, in the groups of the architecture."""
    group_of = architecture_of(decoder.config).parameter_group
    groups = [
        {
            "params": [master],
            "lr": settings.router_lr if group_of(name) == "routers" else settings.lr,
            "weight_decay": settings.weight_decay if group_of(name) == "matrices" else 0.0,
        }
        for name, master in masters.items()
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)


def make_table(models: Sequence[str], results: dict[str, dict[str, Any]]) -> str:
    """Return a row for each model."""
    header = "| | loss, first | highest | last | gradient norm, first | highest | |\n|---|---|---|---|---|---|---|"
    return "\n".join([header, *(row(name, results[name]) for name in models)]) + "\n"


def row(name: str, result: dict[str, Any]) -> str:
    """Return a row of the table."""
    course = Course(result["losses"], result["norms"])
    figures = (course.losses[0], max(course.losses), course.losses[-1], course.norms[0], max(course.norms))
    return f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} | {course.verdict} |"


if __name__ == "__main__":
    run_command(main)
