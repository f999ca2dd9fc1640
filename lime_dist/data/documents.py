"""Where documents end within samples, and what of attention is left within them (``data.document_mask``).

A sample is a piece of the concatenated documents. A document ends with its eos token, and the token after it begins the next one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lime_dist.config.schema import DataConfig
from lime_dist.data.blend import open_training
from lime_dist.data.dataset import Samples
from lime_dist.errors import LimeError

LOOKED_AT = 2048
"""Number of evenly spaced samples from which the mean length of documents within samples is estimated."""


MASK = "data.document_mask=true"


def find_eos(split: Samples, given: int | None, needed: str) -> int:
    """The token that ends every document of a split: ``data.eos_token``, else the one that the split names.

    Args:
        given: ``data.eos_token``.
        needed: the setting that needs it, for messages.

    Raises:
        LimeError: a dataset of the split names none, or another one than ``data.eos_token``.
    """
    eos = given
    for part in split.parts:
        if given is None and part.eos_id is None:
            raise LimeError(
                f"{needed} needs documents that end with a known eos token, and {part.path} names none; give a folder made by "
                "data_tools.pretokenize without --no-eos, or name the token of a .bin/.idx pair with data.eos_token"
            )
        if given is not None and part.eos_id not in (None, given):
            raise LimeError(
                f"data.eos_token={given}, but the documents of {part.path} end with {part.eos_id}; leave out data.eos_token, or give "
                "data that end with the same token"
            )
        eos = part.eos_id if eos is None else eos
    assert eos is not None
    if split.vocab_size is not None and eos >= split.vocab_size:
        raise LimeError(f"data.eos_token={eos}: {split.path} has a vocabulary of {split.vocab_size}")
    return eos


def positions(tokens_BT: np.ndarray, eos: int) -> np.ndarray:
    """The position of every token in its document, as far as the document lies in the sample, int64 [B, T]."""
    index = np.arange(tokens_BT.shape[1])
    starts = np.where(tokens_BT[:, :-1] == eos, index[1:], 0)
    return index - np.maximum.accumulate(np.pad(starts, ((0, 0), (1, 0))), axis=1)


def attended_length(split: Samples, sequence_length: int, samples: int, eos: int) -> float:
    """The length of a sequence in which causal attention reads as many keys per token, (length + 1) / 2, as it does within the
    documents of the first ``samples`` samples of a split."""
    spaced = np.linspace(0, samples - 1, min(samples, LOOKED_AT)).astype(np.int64)
    rows = np.stack([split.sample(i, sequence_length)[:-1] for i in spaced.tolist()])
    return float(2 * positions(rows, eos).mean() + 1)


def attention_length(config: DataConfig, vocab_size: int) -> float:
    """`attended_length` of a run's training data; ``data.sequence_length`` without ``data.document_mask``, or if the data cannot be
    read here. Computed once for a configuration."""
    if not config.document_mask:
        return config.sequence_length
    return _measured(config.model_dump_json(), vocab_size)


@lru_cache(maxsize=8)
def _measured(section: str, vocab_size: int) -> float:
    config = DataConfig.model_validate_json(section)
    try:
        split, order = open_training(config, vocab_size)
        return attended_length(
            split, config.sequence_length, order.num_samples, find_eos(split, config.eos_token, MASK)
        )
    except LimeError:
        return config.sequence_length
