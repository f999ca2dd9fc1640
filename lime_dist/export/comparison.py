"""Compare the logits of two models on the same text, and compute the loss of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lime_dist.data.answers import CountedLabels
from lime_dist.data.dataset import Samples
from lime_dist.data.loader import Batch, ValidationBatches
from lime_dist.errors import LimeError
from lime_dist.model.layers import language_model_loss

Logits = Callable[[Tensor], Tensor]
"""Tokens [B, T] -> logits [B, T, V]."""

TOLERANCE = 1e-5
"""Two models are the same if no logit differs by more than this share of the largest logit."""

COMPARED_TOKENS = 2048
TEXT = """A pipeline cuts a model into stages, and each stage keeps the layers that it was given. While the first one works on
a new piece of a batch, the second finishes the piece before; what goes from one to the other is a tensor, and what comes
back is its gradient. A reader who measures 3.14 seconds where 2.72 were planned will ask: who waits for whom?

    for layer in layers:
        hidden = layer(hidden, history)  # each layer reads what earlier ones left

"No measurement without the command that made it," they said; «кто проверяет?» 数字は嘘をつかない。 Déjà vu, naïveté, 😀.
"""
"""Text to compare models on when a run's validation split cannot be read."""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are apart.

    Attributes:
        difference: largest absolute difference of two logits.
        logit: largest absolute logit of the first model.
        tokens: number of tokens compared.
    """

    difference: float
    logit: float
    tokens: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.difference / self.logit

    def __or__(self, other: Comparison) -> Comparison:
        return Comparison(
            max(self.difference, other.difference), max(self.logit, other.logit), self.tokens + other.tokens
        )


def compare_logits(first: Logits, second: Logits, tokens_NT: Tensor) -> Comparison:
    """Compare two models on rows of tokens, one row at a time."""
    comparison = Comparison(0.0, 0.0, 0)
    with torch.no_grad():
        for row in tokens_NT.split(1):
            one, other = first(row), second(row)
            difference = (one - other).abs().max().item()
            # max() ignores NaN in `Comparison.__or__`; infinity makes the models differ.
            comparison |= Comparison(
                difference if difference == difference else float("inf"), one.abs().max().item(), row.numel()
            )
    return comparison


def first_tokens(split: Samples, sequence_length: int) -> Tensor:
    """The first samples of a split, at most COMPARED_TOKENS tokens but at least one sample, [N, T]."""
    rows = max(1, min(COMPARED_TOKENS // sequence_length, split.num_samples(sequence_length)))
    return torch.cat([tokens for tokens, _ in validation_batches(split, sequence_length, rows)])


def validation_batches(
    split: Samples, sequence_length: int, samples: int, counted: CountedLabels | None = None
) -> Iterator[Batch]:
    """The first samples of a split, on which a run validates, one at a time: (tokens, labels), [1, T] each."""
    return iter(ValidationBatches(split, sequence_length, samples, 1, 0, 1, counted))


def mean_loss(
    logits: Logits,
    batches: Iterator[Batch],
    limit: int | None = None,
    counted_share: float | None = None,
    batch_size: int = 1,
) -> float:
    """Mean cross-entropy in nats per token over samples of equal length. It is computed where the logits are.

    Args:
        batches: one sample each.
        batch_size: number of samples that the model gets at once.
        limit: use at most this many samples; None: all.
        counted_share: share of the labels that count (are not -100); None: all labels count.

    Raises:
        LimeError: the loss is NaN.
    """
    total, samples, limited = 0.0, 0, islice(batches, limit)
    with torch.no_grad():
        while group := list(islice(limited, batch_size)):
            tokens, labels = (torch.cat(parts) for parts in zip(*group, strict=True))
            of_batch = logits(tokens)
            loss = language_model_loss(of_batch, labels.to(of_batch.device), counted_share).item()
            total, samples = total + loss * len(group), samples + len(group)
    loss = total / samples
    if loss != loss:
        raise LimeError("the loss is not a number: the model's weights or its activations are not finite")
    return loss
