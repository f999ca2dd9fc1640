"""How well a model separates similar words: linear separability by layer, and t-SNE clouds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lime_dist.analysis.representations import KINDS, Representations
from lime_dist.export.exported import ExportedModel

FOLDS = 5
MIN_OCCURRENCES = 2 * FOLDS
"""Occurrences that a word needs: two per fold."""


def word_tokens(exported: ExportedModel, words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The token of each word as in a sentence, after a space; and the words that are more than one token."""
    tokens, split = {}, []
    for word in words:
        ids = exported.tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(ids) == 1:
            tokens[word] = int(ids[0])
        else:
            split.append(word)
    return tokens, split


@dataclass(frozen=True)
class Occurrences:
    """The first occurrences of words in the samples, the same number of each word.

    Attributes:
        words: the words that occur often enough.
        labels: [n], the word of each occurrence, sample by sample.
        positions: by sample, the positions of its occurrences, ascending.
    """

    words: Sequence[str]
    labels: np.ndarray
    positions: Sequence[Tensor]

    @property
    def each(self) -> int:
        """Number of occurrences of each word."""
        return len(self.labels) // len(self.words)


def count_words(samples: Sequence[Tensor], words: Mapping[str, int]) -> dict[str, int]:
    """Number of occurrences of each word, given its token, in samples [T]."""
    everything = torch.cat(list(samples))
    return {word: int((everything == token).sum()) for word, token in words.items()}


def find_words(samples: Sequence[Tensor], words: Mapping[str, int], most: int) -> Occurrences | None:
    """At most ``most`` occurrences of each word (given its token) that occurs `MIN_OCCURRENCES` times; None if fewer than two words
    do."""
    counts = {word: count for word, count in count_words(samples, words).items() if count >= MIN_OCCURRENCES}
    if len(counts) < 2:
        return None
    each = min(most, *counts.values())
    left = dict.fromkeys(counts, each)
    names = {words[word]: word for word in counts}
    labels, positions = [], []
    for tokens in samples:
        kept = []
        for position, token in enumerate(tokens.tolist()):
            word = names.get(token)
            if word is not None and left[word]:
                left[word] -= 1
                kept.append(position)
                labels.append(word)
        positions.append(torch.tensor(kept, dtype=torch.long))
    return Occurrences(list(counts), np.asarray(labels), positions)


class WordStates:
    """A model's representations of words in context: by kind, by layer, [n, elements]."""

    def __init__(self, occurrences: Occurrences) -> None:
        self.occurrences = occurrences
        self._positions = iter(occurrences.positions)
        self._rows: dict[str, list[list[Tensor]]] = {kind: [] for kind in KINDS}

    def add(self, sample: Representations) -> None:
        """Add a sample. Samples must come in the order of those in which the words were found."""
        positions = next(self._positions)
        for kind, layers in sample.layers.items():
            columns = self._rows[kind]
            columns += [[] for _ in range(len(layers) - len(columns))]
            for column, rows in zip(columns, layers, strict=True):
                column.append(rows[positions])

    def layers(self, kind: str) -> list[np.ndarray]:
        return [torch.cat(column).numpy() for column in self._rows[kind]]

    def separability(self, seed: int, name: str = "") -> dict[str, list[tuple[float, float]]]:
        """Accuracy of logistic regression on standardised representations in stratified k-fold cross-validation.

        Args:
            seed: of the folds.
            name: label of the progress bar.

        Returns:
            By kind, by layer: mean and standard deviation over the folds. Guessing gives 1 / number of words.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        accuracies: dict[str, list[tuple[float, float]]] = {}
        with warnings.catch_warnings():
            # If the rows are separable, the weights grow without bound; the accuracy has converged long before.
            warnings.simplefilter("ignore", ConvergenceWarning)
            for kind in KINDS:
                bar = tqdm(self.layers(kind), f"{name}: words by {kind}", unit="layer", disable=None)
                scores = [cross_val_score(classifier, rows, self.occurrences.labels, cv=folds) for rows in bar]
                accuracies[kind] = [(float(score.mean()), float(score.std())) for score in scores]
        return accuracies

    def clouds(self, kind: str, layers: Sequence[int], seed: int) -> list[np.ndarray]:
        """t-SNE of some layers, [n, 2] each, initialised with the first two principal components."""
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(self.occurrences.labels) - 1) / 3)
        rows = self.layers(kind)
        return [
            TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows[layer]) for layer in layers
        ]
