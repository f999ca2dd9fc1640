"""How far apart a model keeps words that are nearly the same: linear separability by layer, and clouds to look at."""

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
LEAST = 2 * FOLDS
"""Occurrences that a word needs: two in each fold."""


def word_tokens(exported: ExportedModel, words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The token of each word as it stands within a sentence, behind a space; and the words that have none of their own."""
    found, split = {}, []
    for word in words:
        ids = exported.tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(ids) == 1:
            found[word] = int(ids[0])
        else:
            split.append(word)
    return found, split


@dataclass(frozen=True)
class Occurrences:
    """Where words stand in samples: of each word the first ones, as many as of every other.

    Attributes:
        words: those that occur often enough.
        labels: [n], the word of each occurrence, sample by sample.
        places: by sample, positions in it, ascending.
    """

    words: Sequence[str]
    labels: np.ndarray
    places: Sequence[Tensor]

    @property
    def each(self) -> int:
        """Occurrences of every word."""
        return len(self.labels) // len(self.words)


def count_words(samples: Sequence[Tensor], words: Mapping[str, int]) -> dict[str, int]:
    """Occurrences of each word, given its token, in samples [T]."""
    everything = torch.cat(list(samples))
    return {word: int((everything == token).sum()) for word, token in words.items()}


def find_words(samples: Sequence[Tensor], words: Mapping[str, int], most: int) -> Occurrences | None:
    """At most ``most`` occurrences of each word (given its token) that has `LEAST`; None if fewer than two words have."""
    counts = {word: count for word, count in count_words(samples, words).items() if count >= LEAST}
    if len(counts) < 2:
        return None
    each = min(most, *counts.values())
    left = dict.fromkeys(counts, each)
    names = {words[word]: word for word in counts}
    labels, places = [], []
    for tokens in samples:
        kept = []
        for place, token in enumerate(tokens.tolist()):
            word = names.get(token)
            if word is not None and left[word]:
                left[word] -= 1
                kept.append(place)
                labels.append(word)
        places.append(torch.tensor(kept, dtype=torch.long))
    return Occurrences(list(counts), np.asarray(labels), places)


class WordStates:
    """One model's representations of words in their contexts: by kind, by layer, [n, elements]."""

    def __init__(self, found: Occurrences) -> None:
        self.found = found
        self._places = iter(found.places)
        self._rows: dict[str, list[list[Tensor]]] = {kind: [] for kind in KINDS}

    def add(self, sample: Representations) -> None:
        """Samples come in the order in which the words were looked for."""
        places = next(self._places)
        for kind, layers in sample.layers.items():
            columns = self._rows[kind]
            columns += [[] for _ in range(len(layers) - len(columns))]
            for column, rows in zip(columns, layers, strict=True):
                column.append(rows[places])

    def layers(self, kind: str) -> list[np.ndarray]:
        return [torch.cat(column).numpy() for column in self._rows[kind]]

    def separability(self, seed: int, name: str = "") -> dict[str, list[tuple[float, float]]]:
        """Accuracy of logistic regression on standardised representations, stratified k-fold cross-validation: by kind, by
        layer, its mean and standard deviation over the folds. Guessing gives 1 / number of words. ``name``: the bar's."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        accuracies: dict[str, list[tuple[float, float]]] = {}
        with warnings.catch_warnings():
            # Where rows can be separated the weights would grow on and on; the classes are apart long before.
            warnings.simplefilter("ignore", ConvergenceWarning)
            for kind in KINDS:
                bar = tqdm(self.layers(kind), f"{name}: words by {kind}", unit="layer", disable=None)
                scores = [cross_val_score(classifier, rows, self.found.labels, cv=folds) for rows in bar]
                accuracies[kind] = [(float(score.mean()), float(score.std())) for score in scores]
        return accuracies

    def clouds(self, kind: str, layers: Sequence[int], seed: int) -> list[np.ndarray]:
        """t-SNE of some layers, [n, 2] each, started from the first two principal components."""
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(self.found.labels) - 1) / 3)
        rows = self.layers(kind)
        return [
            TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows[layer]) for layer in layers
        ]
