"""Routers: the weights with which a layer reads the history."""

from __future__ import annotations

import torch
from torch import nn


class KeyValueRouter(nn.Module):
    """R_ℓ [G, entries read · G]: signed weights over the K/V heads of every entry read; columns by entry, then head."""

    def __init__(self, num_heads: int, entries_read: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, entries_read * num_heads))
