"""Continue a prompt with an exported model; prints tokens as they are generated."""

from __future__ import annotations

import argparse
from typing import Any

from lime_dist.commands import CommandParser
from lime_dist.errors import LimeError, run_command
from lime_dist.export.exported import open_export, require_transformers
from lime_dist.paths import user_path

EXAMPLE = """example:
  python -m lime_dist.generate --model exported/quickstart --prompt "A list is" --temperature 0.8 --top-p 0.95 --seed 1"""


def generate(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation on stdout."""
    sampling = sampling_settings(options)
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise LimeError("--prompt: is not UTF-8 text") from None
    transformers = require_transformers()
    exported = open_export(options.model)
    import torch

    tokenizer, model = exported.tokenizer, exported.model
    prompt = tokenizer(options.prompt, return_tensors="pt").input_ids.long()
    if not prompt.numel():
        prompt = torch.tensor([[tokenizer.bos_token_id]])
    if options.seed is not None:
        torch.manual_seed(options.seed)
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    prompt = prompt.to(model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        streamer=streamer,
        **sampling,
    )


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """How to choose the next token, as keyword arguments of the model's ``generate``.

    Raises:
        LimeError: a value is out of range, or has no effect with the others.
    """
    if options.max_new_tokens < 1:
        raise LimeError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    if options.temperature < 0:
        raise LimeError(f"--temperature {options.temperature}: must not be negative; 0 takes the most likely token")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise LimeError(f"--top-p {options.top_p}: must be above 0 and at most 1")
    if options.top_k is not None and options.top_k < 1:
        raise LimeError(f"--top-k {options.top_k}: must be at least 1")
    if options.temperature == 0:
        for name in ("top_p", "top_k", "seed"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise LimeError(
                    f"{flag} {getattr(options, name)}: has an effect only when sampling; add --temperature 1"
                )
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "top_k": 0 if options.top_k is None else options.top_k,
    }


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.generate``."""
    parser = CommandParser(
        prog="python -m lime_dist.generate",
        description=__doc__,
        epilog=EXAMPLE,
    )
    parser.add_argument("--model", required=True, type=user_path, help="the --output of lime_dist.checkpoint.export")
    parser.add_argument("--prompt", required=True, help="text to continue; empty: start a new text")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always take the most likely token")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens with this total probability")
    parser.add_argument("--top-k", type=int, help="sample from this many most likely tokens")
    parser.add_argument("--seed", type=int, help="seed of the sampling; without one, results differ between calls")
    generate(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
