"""A doubly stochastic matrix as a mixture of permutation matrices (arXiv 2601.05732)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def mixture_of_permutations(logits: Tensor, rate: int) -> Tensor:
    """Σ_k softmax(logits)_k · P_k, [..., n!] -> [..., n, n]."""
    permutations = permutation_matrices(rate, logits.dtype, logits.device)
    return (logits.softmax(-1) @ permutations).unflatten(-1, (rate, rate))


@lru_cache(maxsize=16)
def permutation_matrices(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All permutation matrices, the identity first, [n!, n²].

    Those of n + 1 elements are those of n, with a new first row and the column of its 1 in each place.
    """
    matrices = torch.ones(1, 1, 1, dtype=dtype, device=device)
    for count in range(2, size + 1):
        larger = torch.zeros(count, len(matrices), count, count, dtype=dtype, device=device)
        for column in range(count):
            larger[column, :, 0, column] = 1
            larger[column, :, 1:, :column] = matrices[..., :column]
            larger[column, :, 1:, column + 1 :] = matrices[..., column:]
        matrices = larger.flatten(0, 1)
    return matrices.flatten(1)
