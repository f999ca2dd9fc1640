"""Which labels the loss counts: those within documents, or only answers, from an answer token up to the end of the document.

Labels are a function of the sample's own tokens. A sample may start in the middle of a document, so what precedes its first
answer token is not counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.config.schema import DataConfig
from lime_dist.data.dataset import Samples
from lime_dist.data.documents import MASK, find_eos
from lime_dist.errors import LimeError

MEASURED_SAMPLES = 16_384
"""Number of evenly spaced samples from which the counted share of a training split is estimated. The loss is divided by this
share, so it must be a constant of the run; its exact value does not matter."""


class CountedLabels(ABC):
    """A rule for the labels that the loss counts.

    Attributes:
        eos: last token of a document.
    """

    eos: int

    @abstractmethod
    def labels(self, rows_BT1: np.ndarray) -> np.ndarray:
        """Labels [B, T] for the tokens [B, T + 1] of samples: the tokens shifted by one, IGNORED_LABEL where they do not count."""

    @abstractmethod
    def missing(self, split: Samples, sequence_length: int) -> str:
        """Why no label of a split counts, in one line."""

    def share(self, split: Samples, sequence_length: int, samples: int, measured: int | None = None) -> float:
        """Share of the labels that the loss counts in the first ``samples`` samples of a split.

        Args:
            measured: number of evenly spaced samples to look at; None: all.

        Raises:
            LimeError: no label is counted.
        """
        spaced = np.linspace(0, samples - 1, min(samples, measured or samples)).astype(np.int64)
        counted = sum(
            int((self.labels(split.sample(i, sequence_length)[None].astype(np.int64)) != IGNORED_LABEL).sum())
            for i in spaced.tolist()
        )
        if not counted:
            raise LimeError(self.missing(split, sequence_length))
        return counted / (len(spaced) * sequence_length)


@dataclass(frozen=True)
class Answers(CountedLabels):
    """Only answers count.

    Attributes:
        mark: token after which an answer begins.
        eos: last token of an answer.
    """

    mark: int
    eos: int

    def labels(self, rows_BT1: np.ndarray) -> np.ndarray:
        tokens, targets = rows_BT1[:, :-1], rows_BT1[:, 1:]
        borders = (tokens == self.mark) | (tokens == self.eos)
        newest = np.maximum.accumulate(np.where(borders, np.arange(tokens.shape[1]), -1), axis=1)
        # Before the first border this picks token 0, which is not the mark there.
        newest_border = np.take_along_axis(tokens, np.maximum(newest, 0), axis=1)
        return np.where(newest_border == self.mark, targets, IGNORED_LABEL)

    def missing(self, split: Samples, sequence_length: int) -> str:
        return (
            f"{split.path}: no token follows data.answer_token={self.mark} within a sample of {sequence_length} tokens of "
            f"split {split.split!r}; give the id that data_tools.tokenizer printed for the symbol, or count all tokens "
            "(data.answer_token=null; lime_dist.evaluate --all-tokens)"
        )


@dataclass(frozen=True)
class WithinDocuments(CountedLabels):
    """All tokens count but the first ones of documents, which nothing in their own document predicts.

    Attributes:
        eos: last token of a document.
    """

    eos: int

    def labels(self, rows_BT1: np.ndarray) -> np.ndarray:
        return np.where(rows_BT1[:, :-1] == self.eos, IGNORED_LABEL, rows_BT1[:, 1:])

    def missing(self, split: Samples, sequence_length: int) -> str:
        return f"{split.path}: split {split.split!r} has no tokens but eos={self.eos}; give other data"


@dataclass(frozen=True)
class CountedShares:
    """The shares of all labels that the loss counts.

    Attributes:
        training: in the training split; None: all labels are counted.
        validation: in the validation samples; None: all labels are counted, or there is no validation.
    """

    training: float | None = None
    validation: float | None = None


ALL_COUNTED = CountedShares()


def find_answers(split: Samples, answer_token: int | None, eos_token: int | None = None) -> Answers | None:
    """The answers of a split, from ``data.answer_token``; None: the loss counts questions too.

    Args:
        eos_token: ``data.eos_token``.

    Raises:
        LimeError: the split does not say which token ends its documents, or ``answer_token`` does not fit its vocabulary.
    """
    if answer_token is None:
        return None
    eos = find_eos(split, eos_token, f"data.answer_token={answer_token}")
    if split.vocab_size is not None and answer_token >= split.vocab_size:
        raise LimeError(f"data.answer_token={answer_token}: {split.path} has a vocabulary of {split.vocab_size}")
    if answer_token == eos:
        raise LimeError(
            f"data.answer_token={answer_token} is the eos of {split.path}; give the id that data_tools.tokenizer printed for the "
            "symbol before answers"
        )
    return Answers(answer_token, eos)


def find_counted(split: Samples, config: DataConfig) -> CountedLabels | None:
    """The labels of a split that the loss counts; None: all. An answer ends with its document, so it never crosses into another.

    Raises:
        LimeError: as `find_answers`.
    """
    answers = find_answers(split, config.answer_token, config.eos_token)
    if answers is None and config.document_mask:
        return WithinDocuments(find_eos(split, config.eos_token, MASK))
    return answers
