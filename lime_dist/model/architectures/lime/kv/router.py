"""The router of LIMe over keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lime_dist.model.policies import Entry


class KeyValueRouter(nn.Module):
    """Signed weights over the K/V heads of every entry read; columns by entry, then head.

    ``weight`` is R_ℓ [G, slots · G]. A router that reads summaries has separate parameters for them, ``summary_weight`` (Q), and
    for the slots before them, ``first_weight`` (P). The matrix is [P | Q | R].
    """

    def __init__(self, num_heads: int, reads: Sequence[Entry]) -> None:
        super().__init__()
        summaries = [index for index, entry in enumerate(reads) if entry.is_summary]
        begin, end = (summaries[0], summaries[-1] + 1) if summaries else (0, 0)
        self.first_weight = self.summary_weight = None
        if begin:
            self.first_weight = nn.Parameter(torch.empty(num_heads, begin * num_heads))
        if summaries:
            self.summary_weight = nn.Parameter(torch.empty(num_heads, (end - begin) * num_heads))
        self.weight = nn.Parameter(torch.empty(num_heads, (len(reads) - end) * num_heads))

    def matrix(self) -> Tensor:
        """[G, entries read · G]."""
        parts: list[Tensor] = [
            part for part in (self.first_weight, self.summary_weight, self.weight) if part is not None
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
