"""Train very deep models for a few steps from their initial values, in bf16 with float32 masters: is every loss and gradient finite?

Tokens follow a fixed random successor table, so that there is something to learn. AdamW and clipping as in the paper, with a
warm-up over half of the steps. A step is a spike if its loss is more than `SPIKE` above the first one.

example:
  python benchmarks/deep_start.py --layers 128 --steps 20
"""

from __future__ import annotations

import argparse
import math

import torch
from step_cost import VARIANTS

from lime_dist import build_decoder, load_config
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import architecture_of
from lime_dist.model.layers import language_model_loss

SPIKE = 0.5
LEFT_OUT = ("copying",)
"""The model of ``full``, which step_cost.py computes in another way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=32, help="hidden size; 4 heads")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=[name for name in VARIANTS if name not in LEFT_OUT],
                        choices=[name for name in VARIANTS if name not in LEFT_OUT], metavar="VARIANT",
                        help="of step_cost.py")  # fmt: skip
    arguments = parser.parse_args()
    for name in ("layers", "hidden", "steps"):
        if getattr(arguments, name) < 1:
            raise LimeError(f"--{name} {getattr(arguments, name)} must be at least 1")
    print(
        "| | first loss | last loss | highest loss | highest gradient norm | finite, no spike |\n|---|---|---|---|---|---|"
    )
    for name in arguments.variants:
        losses, norms = train(name, arguments.layers, arguments.hidden, arguments.steps)
        steady = all(map(math.isfinite, losses + norms)) and max(losses) <= losses[0] + SPIKE
        print(
            f"| {name} | {losses[0]:.3f} | {losses[-1]:.3f} | {max(losses):.3f} | {max(norms):.2f} | {'yes' if steady else 'NO'} |",
            flush=True,
        )


def train(name: str, layers: int, hidden: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the losses and the gradient norms of the steps."""
    shape = {
        "vocab_size": 64, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    config = load_config(None, [*(f"model.{key}={value}" for key, value in shape.items()), *VARIANTS[name]])
    model, optimizer = build_decoder(config.model, dtype=torch.bfloat16), config.optimizer
    weights = dict(model.named_parameters())
    masters = {key: weight.detach().float().requires_grad_() for key, weight in weights.items()}
    group_of = architecture_of(config.model).parameter_group
    adam = torch.optim.AdamW(
        [
            {
                "params": [masters[key] for key in weights if group_of(key) == group],
                "lr": optimizer.router_lr if group == "routers" else optimizer.lr,
                "weight_decay": optimizer.weight_decay if group == "matrices" else 0.0,
            }
            for group in ("matrices", "plain", "routers")
            if any(group_of(key) == group for key in weights)
        ],
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / max(1, steps // 2)))
    generator = torch.Generator().manual_seed(0)
    successor = torch.randint(64, (64,), generator=generator)
    losses, norms = [], []
    for _ in range(steps):
        tokens = [torch.randint(64, (4,), generator=generator)]
        for _ in range(32):
            tokens.append(successor[tokens[-1]])
        batch_BT = torch.stack(tokens, 1)
        loss = language_model_loss(model(batch_BT[:, :-1]), batch_BT[:, 1:])
        loss.backward()
        for key, weight in weights.items():
            assert weight.grad is not None
            masters[key].grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(list(masters.values()), optimizer.max_grad_norm)
        adam.step()
        warm_up.step()
        with torch.no_grad():
            for key, weight in weights.items():
                weight.copy_(masters[key])
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


if __name__ == "__main__":
    run_command(main)
