"""A blend of datasets. The dataset that a position reads from is a pure function of (weights, seed, position)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from lime_dist.config.schema import DataConfig
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.order import SampleOrder
from lime_dist.errors import LimeError

BLOCK = 4096
"""Number of positions in which every dataset has its share, exact to one sample. Each block has its own permutation."""


class Pattern:
    """Divides positions 0, 1, 2, … among datasets by weight.

    Every block of BLOCK positions has the same count of each dataset: the weights, rounded by largest remainders.

    Args:
        weights: positive numbers.

    Raises:
        LimeError: a weight is too small for one position in a block.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * BLOCK
        self.counts = np.floor(shares).astype(np.int64)
        missing = BLOCK - int(self.counts.sum())
        self.counts[np.argsort(-(shares - self.counts), kind="stable")[:missing]] += 1
        if int(self.counts.min()) < 1:
            raise LimeError(
                f"data.blend: weight {weights[int(self.counts.argmin())]} of {sum(weights):g} is less than one in {BLOCK}; "
                "raise it, or leave that dataset out"
            )
        self._order = SampleOrder(seed, BLOCK)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each of the positions [n], and the number of earlier positions that read from it; both int64 [n]."""
        blocks = positions // BLOCK
        permuted = self._order.samples_at(positions)  # its epochs are the blocks
        datasets = np.searchsorted(self._starts, permuted, side="right") - 1
        return datasets, blocks * self.counts[datasets] + permuted - self._starts[datasets]

    def read(self, positions: int) -> list[int]:
        """Number of the first ``positions`` positions that read from each dataset."""
        whole, rest = divmod(positions, BLOCK)
        datasets, _ = self.places(whole * BLOCK + np.arange(rest))
        return (whole * self.counts + np.bincount(datasets, minlength=len(self.counts))).tolist()


class Blend:
    """Splits of several datasets with the interface of one `TokenSplit`. Samples are numbered dataset by dataset.

    Attributes:
        path: the paths of all datasets, in one text.
        split: name of the split.
        vocab_size: the largest of the datasets; None if no dataset states one.
        tokenizer_hash: of the tokenizer that made the datasets; None if no dataset states one.
    """

    def __init__(self, splits: Sequence[TokenSplit], weights: Sequence[float]) -> None:
        self.splits, self.weights = splits, weights
        self.path, self.split = " + ".join(str(split.path) for split in splits), splits[0].split
        known = [split for split in splits if split.tokenizer_hash is not None]
        for other in known[1:]:
            if other.tokenizer_hash != known[0].tokenizer_hash:
                raise LimeError(
                    f"data.blend: {other.path} and {known[0].path} were made with different tokenizers; pretokenize one of "
                    "them again"
                )
        self.tokenizer_hash = known[0].tokenizer_hash if known else None
        self.vocab_size = max((split.vocab_size for split in splits if split.vocab_size is not None), default=None)
        self._starts: list[int] = []
        self._length = 0

    @property
    def parts(self) -> Sequence[TokenSplit]:
        return self.splits

    def num_samples(self, sequence_length: int) -> int:
        """Number of samples of all datasets."""
        counts = [split.num_samples(sequence_length) for split in self.splits]
        self._starts, self._length = [0, *np.cumsum(counts[:-1]).tolist()], sequence_length
        return sum(counts)

    def start(self, dataset: int, sequence_length: int) -> int:
        """Index of a dataset's first sample."""
        if sequence_length != self._length:
            self.num_samples(sequence_length)
        return self._starts[dataset]

    def sample(self, i: int, sequence_length: int) -> np.ndarray:
        """Tokens [sequence_length + 1] of a sample, as `TokenSplit.sample`."""
        if sequence_length != self._length:
            self.num_samples(sequence_length)
        dataset = bisect_right(self._starts, i) - 1
        return self.splits[dataset].sample(i - self._starts[dataset], sequence_length)


class BlendOrder:
    """The order of a blend's samples under a seed. Positions are divided by weight; each dataset has its own epochs."""

    def __init__(self, blend: Blend, sequence_length: int, seed: int) -> None:
        self.num_samples = blend.num_samples(sequence_length)
        self._pattern = Pattern(blend.weights, seed)
        self._starts = np.asarray([blend.start(k, sequence_length) for k in range(len(blend.splits))])
        self._orders = [
            SampleOrder(seed + number, split.num_samples(sequence_length))
            for number, split in enumerate(blend.splits, start=1)
        ]

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Samples, int64, at ``positions`` of any shape; the result has the same shape."""
        datasets, turns = self._pattern.places(np.asarray(positions).reshape(-1))
        samples = np.empty(datasets.shape, dtype=np.int64)
        for dataset in np.unique(datasets):
            chosen = datasets == dataset
            samples[chosen] = self._starts[dataset] + self._orders[dataset].samples_at(turns[chosen])
        return samples.reshape(np.shape(positions))

    def counts(self, positions: int) -> list[int]:
        """Number of the first ``positions`` positions that read from each dataset."""
        return self._pattern.read(positions)

    def shares(self, positions: int) -> list[str]:
        """A line per dataset about a run of ``positions`` samples: the samples read, their share, and the number of epochs."""
        return [
            f"{count:,} of {positions:,} samples ({count / max(1, positions):.2%}), {count / order.num_samples:.2f} epochs"
            for count, order in zip(self.counts(positions), self._orders, strict=True)
        ]


class BlendedValidation:
    """The validation splits of a blend, interleaved in its proportions, each from its first sample on; always the same."""

    def __init__(self, blend: Blend) -> None:
        self.path, self.split = blend.path, blend.split
        self.vocab_size = blend.vocab_size
        self._blend, self._pattern = blend, Pattern(blend.weights, 0)
        self._datasets, self._turns = np.empty(0, np.int64), np.empty(0, np.int64)

    @property
    def parts(self) -> Sequence[TokenSplit]:
        return self._blend.splits

    def num_samples(self, sequence_length: int) -> int:
        """Number of samples before a dataset has no more."""
        available = [split.num_samples(sequence_length) for split in self._blend.splits]
        datasets, _ = self._pattern.places(np.arange(sum(available) + 1))
        self._datasets, self._turns = datasets, np.empty_like(datasets)
        for dataset in range(len(available)):
            chosen = datasets == dataset
            self._turns[chosen] = np.arange(int(chosen.sum()))
        return int(np.flatnonzero(self._turns >= np.asarray(available)[datasets])[0])

    def sample(self, i: int, sequence_length: int) -> np.ndarray:
        """Tokens [sequence_length + 1] of a sample; `num_samples` must have been called before."""
        return self._blend.splits[int(self._datasets[i])].sample(int(self._turns[i]), sequence_length)


def open_training(config: DataConfig, vocab_size: int) -> tuple[TokenSplit | Blend, SampleOrder | BlendOrder]:
    """The training samples and their order.

    Raises:
        LimeError: a dataset cannot be read, or the datasets do not fit together.
    """
    splits = _splits(config, "train", vocab_size)
    if config.blend is None:
        return splits[0], SampleOrder(config.seed, splits[0].num_samples(config.sequence_length))
    blend = Blend(splits, [entry.weight for entry in config.blend])
    return blend, BlendOrder(blend, config.sequence_length, config.seed)


def open_validation(config: DataConfig, vocab_size: int) -> TokenSplit | BlendedValidation:
    """The validation samples, in the order in which every validation reads them."""
    splits = _splits(config, "validation", vocab_size)
    return splits[0] if config.blend is None else BlendedValidation(Blend(splits, [b.weight for b in config.blend]))


def _splits(config: DataConfig, split: str, vocab_size: int) -> list[TokenSplit]:
    return [TokenSplit(path, split, config.validation_fraction, vocab_size) for path in config.paths]
