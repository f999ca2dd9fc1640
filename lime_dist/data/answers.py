"""Which tokens a loss counts where only answers are learnt: those after a mark, up to the end of the document.

A sample is cut out of the run of all tokens, so it may begin in the middle of a document. What stands before its first mark is not
counted: its labels are a function of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lime_dist.data.dataset import Samples, TokenSplit
from lime_dist.errors import LimeError

IGNORED = -100
"""The label of a token that is not counted; torch's own default."""

MEASURED_SAMPLES = 16_384
"""So many evenly spaced samples of a training split say which share of its tokens is counted: any constant would do."""


@dataclass(frozen=True)
class Answers:
    """The ids of the mark, after which an answer begins, and of eos, which is its last token."""

    mark: int
    eos: int

    def labels(self, rows_BT1: np.ndarray) -> np.ndarray:
        """For the tokens [B, T + 1] of samples the labels [B, T]: the tokens shifted by one, IGNORED outside of answers."""
        tokens, targets = rows_BT1[:, :-1], rows_BT1[:, 1:]
        borders = (tokens == self.mark) | (tokens == self.eos)
        newest = np.maximum.accumulate(np.where(borders, np.arange(tokens.shape[1]), -1), axis=1)
        # Before the first border that is token 0, which is no mark then.
        newest_border = np.take_along_axis(tokens, np.maximum(newest, 0), axis=1)
        return np.where(newest_border == self.mark, targets, IGNORED)

    def share(self, split: Samples, sequence_length: int, samples: int, measured: int | None = None) -> float:
        """The share of labels that are counted in the first ``samples`` samples of a split.

        Args:
            measured: look at no more than so many of them, evenly spaced; None: at all.

        Raises:
            LimeError: there are none.
        """
        spaced = np.linspace(0, samples - 1, min(samples, measured or samples)).astype(np.int64)
        counted = sum(
            int((self.labels(split.sample(i, sequence_length)[None].astype(np.int64)) != IGNORED).sum())
            for i in spaced.tolist()
        )
        if not counted:
            raise LimeError(
                f"{split.path}: no token follows data.answer_token={self.mark} within a sample of {sequence_length} tokens of "
                f"split {split.split!r}; give the id that data_tools.tokenizer printed for the symbol, or count all tokens "
                "(data.answer_token=null; lime_dist.evaluate --all-tokens)"
            )
        return counted / (len(spaced) * sequence_length)


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


def find_answers(split: Samples, answer_token: int | None) -> Answers | None:
    """How labels of a split are made; None: every token is counted.

    Raises:
        LimeError: it is not known how the split's documents end, or its vocabulary has no such token.
    """
    if answer_token is None:
        return None
    if not isinstance(split, TokenSplit) or split.eos_id is None:
        raise LimeError(
            f"data.answer_token={answer_token} needs documents that end with a known eos, and {split.path} does not say of any; "
            "give a folder made by data_tools.pretokenize without --no-eos"
        )
    if split.vocab_size is not None and answer_token >= split.vocab_size:
        raise LimeError(f"data.answer_token={answer_token}: {split.path} has a vocabulary of {split.vocab_size}")
    if answer_token == split.eos_id:
        raise LimeError(
            f"data.answer_token={answer_token} is the eos of {split.path}; give the id that data_tools.tokenizer printed for the "
            "symbol before answers"
        )
    return Answers(answer_token, split.eos_id)
