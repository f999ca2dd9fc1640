"""``python -m lime_dist.checkpoint.importing``: start a run from the weights of an existing model."""

from __future__ import annotations

from lime_dist.commands import CommandParser
from lime_dist.config.load import load_config
from lime_dist.errors import run_command
from lime_dist.export.importing import import_model
from lime_dist.paths import user_path

EXAMPLE = """example:
  python -m lime_dist.checkpoint.importing --model models/llama-1b --config lime.yaml run.directory=runs/from-llama
  deepspeed --num_gpus 2 pretrain.py --config lime.yaml run.directory=runs/from-llama
  python -m lime_dist.checkpoint.importing --model exported/quickstart --config task.yaml      (fine-tuning)"""


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.checkpoint.importing``."""
    parser = CommandParser(
        prog="python -m lime_dist.checkpoint.importing",
        description="Write an exported model or a Hugging Face LLaMA as the checkpoint of step 0 of a run. pretrain.py resumes\n"
        "from it. The configuration must have the original's shape. Nothing is written unless the logits agree.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--model", required=True, type=user_path, help="folder with config.json and safetensors")
    parser.add_argument(
        "--config", required=True, help="YAML file of the run; the checkpoint is written into its run.directory"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    path = import_model(options.model, load_config(options.config, options.overrides))
    print(f"imported {options.model}: {path}; run pretrain.py with the same configuration to train from it")


if __name__ == "__main__":
    run_command(main)
