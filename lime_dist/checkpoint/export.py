"""``python -m lime_dist.checkpoint.export``: write a checkpoint as a Hugging Face model."""

from __future__ import annotations

from typing import Any

from lime_dist.commands import CommandParser
from lime_dist.errors import run_command
from lime_dist.export.exporting import export
from lime_dist.paths import user_path

EXAMPLE = """example:
  python -m lime_dist.checkpoint.export --checkpoint runs/quickstart --output exported/quickstart"""


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.checkpoint.export``."""
    parser = CommandParser(
        prog="python -m lime_dist.checkpoint.export",
        description="Write a checkpoint as a Hugging Face model: safetensors, configuration, tokenizer, modelling code.\n"
        "Nothing is written unless its logits equal the trainer's.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=user_path,
        help="a run folder, its checkpoints folder, one global_stepN folder, or checkpoints/best",
    )
    parser.add_argument("--output", required=True, type=user_path, help="folder to create")
    parser.add_argument(
        "--tokenizer", type=user_path, help="tokenizer folder (default: the one in the run's data.path)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="size limit of one weights file (default 5GB)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the weights: float32, as the optimizer keeps them also in bf16 runs, or bfloat16, half as large "
        "(default float32)",
    )
    options = parser.parse_args(arguments)
    certificate = export(options.checkpoint, options.output, options.tokenizer, options.max_shard_size, options.dtype)
    logits: dict[str, Any] = certificate["logits"]
    print(
        f"compared on {logits['tokens']:,} tokens ({logits['text']}): logits differ by at most "
        f"{logits['largest_difference']:.1e} (with cache {logits['largest_difference_with_cache']:.1e}); the largest logit is "
        f"{logits['largest_logit']:.2f}"
    )
    print(f"exported {certificate['architecture']}, step {certificate['source']['step']}: {options.output}")


if __name__ == "__main__":
    run_command(main)
