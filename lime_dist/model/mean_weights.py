"""The mean, over tokens, of weights with which layers read entries, where the weights depend on the token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.model.architecture import mean_weights_name


class MeanWeights:
    """Sums of weights in forward passes without gradients. A history adds to one that it was given (`LayerHistory.mean_weights`)."""

    def __init__(self) -> None:
        self._totals: dict[tuple[int, int], Tensor] = {}
        self._tokens: dict[tuple[int, int], int] = {}

    def add(self, layer: int, totals_RE: Tensor, num_tokens: int, first: int = 0) -> None:
        """Add what a layer's heads or reads R weighed entries E with.

        Args:
            totals_RE: sums over ``num_tokens`` tokens.
            first: the number of the first of them.
        """
        self._add((layer, first), totals_RE.detach().double(), num_tokens)

    def merge(self, others: Iterable[MeanWeights]) -> MeanWeights:
        """Add, on the CPU, those of other stages and replicas; returns itself."""
        for other in others:
            for place, totals in other._totals.items():
                self._add(place, totals.cpu(), other._tokens[place])
        return self

    def by_name(self) -> dict[str, Tensor]:
        """Means [R, E] of every layer that has some, under the names that `Architecture.head_map` looks for. Of reads of several
        lengths, the shorter ones end with zeros."""
        by_layer: dict[int, list[Tensor]] = {}
        for layer, first in sorted(self._totals):
            by_layer.setdefault(layer, []).append(self._totals[layer, first] / self._tokens[layer, first])
        return {mean_weights_name(layer): stacked(rows) for layer, rows in by_layer.items()}

    def _add(self, place: tuple[int, int], totals_RE: Tensor, num_tokens: int) -> None:
        before = self._totals.get(place)
        self._totals[place] = totals_RE if before is None else before + totals_RE
        self._tokens[place] = self._tokens.get(place, 0) + num_tokens


def remainder(totals_RE: Tensor, num_tokens: int) -> Tensor:
    """What sums of weights over tokens leave for one more entry, [R, 1]. Rounding makes none of it negative, or an entropy would be
    infinite."""
    return (num_tokens - totals_RE.sum(1, keepdim=True)).clamp_min_(0)


def stacked(parts: Iterable[Tensor]) -> Tensor:
    """Tensors [..., R, E] with different E as one [..., all R, largest E], with zeros at the ends of shorter ones."""
    parts = list(parts)
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts], -2)
