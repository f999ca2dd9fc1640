"""Compute loss and perplexity of an exported model on shards. On a run's validation samples, it is the trainer's validation loss."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from lime_dist.commands import CommandParser
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

EXAMPLE = """example:
  python -m lime_dist.evaluate --model exported/quickstart --data data/quickstart/shards"""


def evaluate(
    model: Path,
    data: Path,
    split_name: str,
    samples: int | None,
    sequence_length: int | None,
    all_tokens: bool = False,
    device: str | None = None,
    batch_size: int = 1,
) -> float:
    """Mean cross-entropy in nats per token over the first samples of a split, in order, in float32. For a run that was trained
    on answers only (``data.answer_token``), over the tokens of answers; with ``data.document_mask``, within documents.

    Args:
        samples: number of samples; None: as many as the run validated on (or all, if there are fewer); 0: all.
        sequence_length: tokens per sample; None: the run's.
        all_tokens: count all tokens, also for a run that was trained on answers only.
        device: where to compute; None: on the GPU if there is one.
        batch_size: number of samples at once.

    Raises:
        LimeError: the model or the data cannot be read, or do not match.
    """
    for flag, value, least in (
        ("--samples", samples, 0),
        ("--sequence-length", sequence_length, 1),
        ("--batch-size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise LimeError(f"{flag} {value}: must be at least {least}")
    from lime_dist.config.schema import DataConfig
    from lime_dist.data.answers import find_counted
    from lime_dist.data.dataset import TokenSplit
    from lime_dist.data.documents import MASK, find_eos
    from lime_dist.export.comparison import mean_loss, validation_batches
    from lime_dist.export.exported import check_vocabulary, open_verified, verify

    certificate = verify(model)
    training = certificate["training"]
    # a pair has neither splits nor a vocabulary of its own; exports of earlier versions do not say the fraction
    fraction = training.get("validation_fraction", DataConfig.model_fields["validation_fraction"].default)
    split = TokenSplit(data, split_name, fraction, certificate["tokenizer"]["vocab_size"])
    check_vocabulary(certificate, model, split)
    length = training["sequence_length"] if sequence_length is None else sequence_length
    available = split.num_samples(length)
    if samples is None:
        samples = min(training["evaluation_samples"], available)
    elif samples > available:
        raise LimeError(f"--samples {samples}: {data} has {available} {split_name} samples of {length} tokens")
    samples = samples or available
    keys = ("answer_token", "document_mask", "eos_token")
    settings = DataConfig(path=str(data), **{key: training[key] for key in keys if training.get(key) is not None})
    if all_tokens:
        settings = settings.model_copy(update={"answer_token": None})
    counted = find_counted(split, settings)
    share = counted.share(split, length, samples) if counted is not None else None
    eos = find_eos(split, settings.eos_token, MASK) if settings.document_mask else None
    exported = open_verified(model, certificate, device)
    batches = validation_batches(split, length, samples, counted)
    loss = mean_loss(partial(exported.logits, eos=eos), batches, counted_share=share, batch_size=batch_size)
    print(f"{samples:,} {split_name} samples of {length} tokens of {data}")
    print(
        f"loss {loss:.6f} nats per {'answer ' if settings.answer_token is not None else ''}token, perplexity {math.exp(loss):.4f}"
    )
    return loss


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.evaluate``."""
    parser = CommandParser(
        prog="python -m lime_dist.evaluate",
        description=__doc__,
        epilog=EXAMPLE,
    )
    parser.add_argument("--model", required=True, type=user_path, help="the --output of lime_dist.checkpoint.export")
    parser.add_argument(
        "--data",
        required=True,
        type=user_path,
        help="folder of shards with the model's tokenizer, or the prefix of a .bin/.idx pair",
    )
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument(
        "--samples", type=int, help="number of samples, from the first on (default: as the run validated on; 0: all)"
    )
    parser.add_argument("--sequence-length", type=int, help="tokens per sample (default: the run's)")
    parser.add_argument(
        "--all-tokens",
        action="store_true",
        help="count all tokens, also for a run that was trained on answers only (data.answer_token)",
    )
    parser.add_argument("--device", help="where to compute, such as cpu or cuda:1 (default: the GPU, if there is one)")
    parser.add_argument("--batch-size", type=int, default=1, help="number of samples at once (default: 1)")
    options = parser.parse_args(arguments)
    given = (options.model, options.data, options.split, options.samples, options.sequence_length, options.all_tokens)
    evaluate(*given, options.device, options.batch_size)


if __name__ == "__main__":
    run_command(main)
