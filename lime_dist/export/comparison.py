"""Two models on the same real text: how far their logits are apart, and the loss of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lime_dist.data.answers import Answers
from lime_dist.data.dataset import Samples
from lime_dist.data.loader import Batch, ValidationBatches
from lime_dist.errors import LimeError
from lime_dist.model.layers import language_model_loss

Logits = Callable[[Tensor], Tensor]
"""Tokens [B, T] -> logits [B, T, V]."""

TOLERANCE = 1e-5
"""Of the largest difference of two models' logits, as a share of the largest logit, in float32."""

COMPARED_TOKENS = 2048
TEXT = """A pipeline cuts a model into stages, and each stage keeps the layers that it was given. While the first one works on
a new piece of a batch, the second finishes the piece before; what goes from one to the other is a tensor, and what comes
back is its gradient. A reader who measures 3.14 seconds where 2.72 were planned will ask: who waits for whom?

    for layer in layers:
        hidden = layer(hidden, history)  # each layer reads what earlier ones left

"No measurement without the command that made it," they said; «кто проверяет?» 数字は嘘をつかない。 Déjà vu, naïveté, 😀.
"""
"""What models are compared on where a run's own validation text cannot be reached."""


@dataclass(frozen=True)
class Comparison:
    """Largest absolute difference of logits, largest logit, and how many tokens were read."""

    difference: float
    logit: float
    tokens: int

    @property
    def relative(self) -> float:
        return self.difference / self.logit

    def __or__(self, other: Comparison) -> Comparison:
        return Comparison(
            max(self.difference, other.difference), max(self.logit, other.logit), self.tokens + other.tokens
        )


def compare_logits(first: Logits, second: Logits, tokens_NT: Tensor) -> Comparison:
    """Compare two models on rows of tokens, one row at a time."""
    found = Comparison(0.0, 0.0, 0)
    with torch.no_grad():
        for row in tokens_NT.split(1):
            one, other = first(row), second(row)
            difference = (one - other).abs().max().item()
            # A maximum passes over what is not a number; a difference of that kind is no agreement.
            found |= Comparison(
                difference if difference == difference else float("inf"), one.abs().max().item(), row.numel()
            )
    return found


def first_tokens(split: Samples, sequence_length: int) -> Tensor:
    """The first samples of a split, about COMPARED_TOKENS tokens, [N, T]."""
    rows = max(1, min(COMPARED_TOKENS // sequence_length, split.num_samples(sequence_length)))
    return torch.cat([tokens for tokens, _ in validation_batches(split, sequence_length, rows)])


def validation_batches(
    split: Samples, sequence_length: int, samples: int, answers: Answers | None = None
) -> Iterator[Batch]:
    """The first samples of a split one by one, (tokens, labels) [1, T] each: what a run validates on."""
    return iter(ValidationBatches(split, sequence_length, samples, 1, 0, 1, answers))


def mean_loss(
    logits: Logits, batches: Iterator[Batch], limit: int | None = None, counted_share: float | None = None
) -> float:
    """Mean cross-entropy in nats per token over samples of equal length.

    Args:
        counted_share: of all these labels, those that are counted (not -100); None: all are.

    Raises:
        LimeError: it is not a number.
    """
    losses = []
    with torch.no_grad():
        for tokens, labels in islice(batches, limit):
            losses.append(language_model_loss(logits(tokens), labels, counted_share).item())
    loss = sum(losses) / len(losses)
    if loss != loss:
        raise LimeError("the loss is not a number: the model's weights or its activations are not finite")
    return loss
