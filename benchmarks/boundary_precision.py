"""Measure what rounding at stage boundaries costs: errors against float64 when entries cross, and when partial mixtures do.

A decoder with a full history runs in one process, stage after stage, with the same weights in float64. Only what crosses a
boundary is rounded to bf16, payloads and gradients. *entries*: pipeline.boundary=entries. *minimal*: partial mixtures are rounded
once at each boundary. *float32 sums*: as minimal, but partial mixtures are not rounded, and cost two entries each. Below, everything
is in bf16, parameters and arithmetic included; *one process* has no boundaries.

Errors are relative, in the 2-norm: of the logits' loss, and of all gradients together, of those of routers, and of the embedding,
which every boundary comes before. Means over batches of random tokens.

example:
  python benchmarks/boundary_precision.py --output runs/boundary_precision
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

import torch
from results import write
from staged import Rounding, as_bf16, staged_logits
from torch import Tensor

from lime_dist import build_decoder, load_config
from lime_dist.errors import run_command
from lime_dist.model.architecture import model_crossings
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.decoder import Decoder
from lime_dist.model.layers import language_model_loss
from lime_dist.paths import user_path

MINIMAL, FLOAT32_SUMS = Prices(1, 1), Prices(1, 2)
FORMS = {"entries": ENTRIES, "minimal": MINIMAL, "float32 sums": FLOAT32_SUMS}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = load_config(None, [
        "model.vocab_size=256", f"model.hidden_size={arguments.hidden}", f"model.intermediate_size={3 * arguments.hidden}",
        "model.num_attention_heads=8", "model.num_key_value_heads=4", f"model.num_hidden_layers={arguments.layers}",
    ]).model  # fmt: skip
    whole, low = (build_decoder(model, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    with torch.no_grad():
        for exact, rounded in zip(whole.parameters(), low.parameters(), strict=True):
            exact.copy_(rounded)  # both have the same weights
    lines = [
        "| stages | what crosses | entries' worth over all boundaries | loss | all gradients | routers | embedding |",
        "|---|---|---|---|---|---|---|",
    ]
    for arithmetic, decoder in (("", whole), (", all in bf16", low)):
        for stages in [*arguments.stages, *([1] if arithmetic else [])]:
            bounds = list(range(0, arguments.layers + 1, arguments.layers // stages))
            for form, prices in FORMS.items():
                if (arithmetic and prices is FLOAT32_SUMS) or (stages == 1 and prices is not ENTRIES):
                    continue
                rows = [measure(whole, decoder, bounds, prices, batch) for batch in range(arguments.batches)]
                cells = [f"{fmean(column):.2e}" for column in zip(*rows, strict=True)]
                crossing = [model_crossings(model, prices)[b] for b in bounds[1:-1]]
                sent = sum(len(c.entries) + len(c.mixtures) * (prices.mixture or 1) for c in crossing)
                name = "one process" if stages == 1 else form
                lines.append(f"| {stages} | {name}{arithmetic} | {sent} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    write(arguments.output / "table.md", "\n".join(lines) + "\n")


def measure(whole: Decoder, decoder: Decoder, bounds: list[int], prices: Prices, batch: int) -> list[float]:
    """Return the errors of one batch."""
    tokens_BT = torch.randint(256, (2, 129), generator=torch.Generator().manual_seed(batch))
    there = (as_bf16, as_bf16, torch.clone if prices is FLOAT32_SUMS else as_bf16)
    exact_loss, exact = gradients(whole, tokens_BT, [0, whole.config.num_hidden_layers], there, ENTRIES)
    loss, actual = gradients(decoder, tokens_BT, bounds, there, prices)
    groups = (lambda name: True, lambda name: ".router." in name, lambda name: "embed" in name)
    errors = [abs(loss / exact_loss - 1)]
    for chosen in groups:
        names = [name for name in exact if chosen(name)]
        a, b = (torch.cat([g[name].flatten().double() for name in names]) for g in (actual, exact))
        errors.append(float((a - b).norm() / b.norm()))
    return errors


def gradients(
    decoder: Decoder, tokens_BT: Tensor, bounds: list[int], there: Sequence[Rounding], prices: Prices
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of stages with these bounds. Gradients of payloads are rounded to bf16."""
    decoder.zero_grad()
    logits = staged_logits(decoder, tokens_BT[:, :-1], bounds, there, [as_bf16] * 3, prices)
    loss = language_model_loss(logits, tokens_BT[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    run_command(main)
