"""The weights of chunk summaries."""

from __future__ import annotations

import torch
from torch import nn


class ChunkSummary(nn.Module):
    """A_m, the weights of a chunk's summary.

    ``routes: kv``: signed weights [num_rows · G, chunk size · G]. ``routes: hidden``: logits [num_rows, chunk size] of a softmax
    over the chunk's layers.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
