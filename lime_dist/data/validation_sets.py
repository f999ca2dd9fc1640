"""Named validation sets: ``data.validation``. Each has its own curve beside that of the data's own validation split."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lime_dist.config.schema import Config
from lime_dist.data.answers import CountedLabels
from lime_dist.data.blend import Blend
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.indexed import is_pair
from lime_dist.data.loader import ValidationBatches
from lime_dist.errors import LimeError


@dataclass(frozen=True)
class ValidationSet:
    """The samples of one validation set that a run reads.

    Attributes:
        name: key in ``data.validation``.
        evaluation_samples: number of its first samples that a validation reads.
        counted: which labels the loss counts; None: all.
        counted_share: share of the labels that the loss counts; None: all.
    """

    name: str
    split: TokenSplit
    evaluation_samples: int
    counted: CountedLabels | None
    counted_share: float | None

    def batches(
        self, config: Config, replica: int, replicas: int, pinned_for: torch.device | None = None
    ) -> ValidationBatches:
        """Its micro-batches of a replica, pinned for a GPU."""
        return ValidationBatches(
            self.split, config.data.sequence_length, self.evaluation_samples, config.train.micro_batch_size, replica,
            replicas, self.counted, pinned_for,
        )  # fmt: skip


def open_validation_sets(
    config: Config, training: TokenSplit | Blend, counted: CountedLabels | None, wanted: int, replicas: int
) -> tuple[ValidationSet, ...]:
    """Open the sets of ``data.validation``, in their order.

    Args:
        wanted: samples of each set, as far as it has them.

    Raises:
        LimeError: a set cannot be read, has too few samples, or was made with another tokenizer than the training data, or ends
            documents with another token.
    """
    wide, length = config.train.micro_batch_size * replicas, config.data.sequence_length
    sets = []
    for name, path in config.data.validation.items():
        split = _open(path, config)
        if (
            None not in (split.tokenizer_hash, training.tokenizer_hash)
            and split.tokenizer_hash != training.tokenizer_hash
        ):
            raise LimeError(
                f"data.validation.{name}: {path} and {training.path} were made with different tokenizers; pretokenize one of "
                "them again"
            )
        if counted is not None and split.eos_id not in (None, counted.eos):
            raise LimeError(
                f"data.validation.{name}: the documents of {path} end with the token {split.eos_id}, those of {training.path} with "
                f"{counted.eos}; pretokenize one of them again"
            )
        samples = fitting_samples(wanted, split.num_samples(length), wide)
        if not samples:
            raise LimeError(
                f"data.validation.{name}: {path} has {split.num_samples(length)} samples of {length} tokens, but one micro-batch "
                f"of all replicas needs {wide}; give more text, or lower train.micro_batch_size"
            )
        share = None if counted is None else counted.share(split, length, samples)
        sets.append(ValidationSet(name, split, samples, counted, share))
    return tuple(sets)


def fitting_samples(wanted: int, available: int, wide: int) -> int:
    """The samples of a validation: ``wanted``, as far as the run allows.

    Args:
        available: samples of the split.
        wide: samples of one micro-batch of all replicas.

    Returns:
        A multiple of ``wide``; 0 if not even one micro-batch is available.
    """
    return min(max(wanted, wide), available) // wide * wide


def _open(path: str, config: Config) -> TokenSplit:
    """What a run may validate on: all of a corpus that it does not train on, unless that has a validation split of its own."""
    data, vocab_size = config.data, config.model.vocab_size
    if path in data.paths:
        return TokenSplit(path, "validation", data.validation_fraction, vocab_size)
    if is_pair(path):
        return TokenSplit(path, "validation", 1.0, vocab_size)
    split = TokenSplit(path, "validation")
    return split if split.num_tokens else TokenSplit(path, "train")
