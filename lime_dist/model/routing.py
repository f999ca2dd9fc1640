"""Routers: the weights with which a layer reads the history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lime_dist.model.policies import Entry


class KeyValueRouter(nn.Module):
    """Signed weights over the K/V heads of every entry read; columns by entry, then head.

    ``weight`` is R_ℓ [G, slots · G]. A router that reads summaries has a parameter of its own for them,
    ``summary_weight`` (Q), and one for the slots before them, ``first_weight`` (P); the matrix is [P | Q | R].
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


class StaticRouter(nn.Module):
    """softmax over the entries read of w_ℓ [H, E]; with ``top_p`` the smallest weights are dropped."""

    def __init__(self, num_heads: int, entries_read: int, top_p: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, entries_read))
        self.top_p = top_p

    def matrix(self) -> Tensor:
        """[H, E], the same for every token."""
        weights = self.weight.softmax(-1)
        return weights if self.top_p is None or self.top_p == 1 else prune(weights, self.top_p)


class DynamicRouter(nn.Module):
    """softmax over the entries read of W_ℓ·x, per token and head; W_ℓ [H·E, D], rows by head, then entry."""

    def __init__(self, num_heads: int, entries_read: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads * entries_read, hidden_size))
        self.num_heads = num_heads

    def matrix(self) -> None:
        """None: the weights depend on the layer's own state."""

    def forward(self, state_ND: Tensor) -> Tensor:
        """Weights [N, H, E] from the layer's own state under the history norm, [N, D]."""
        logits = nn.functional.linear(state_ND, self.weight)
        return logits.view(len(state_ND), self.num_heads, -1).softmax(-1)


Router = KeyValueRouter | StaticRouter | DynamicRouter


class ChunkSummary(nn.Module):
    """A_m: the weights of a chunk's summary. ``routes: kv``: [rows · G, chunk size · G], signed; ``routes: hidden``: [rows,
    chunk size], logits of a softmax over the chunk's layers."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


def prune(weights: Tensor, top_p: float) -> Tensor:
    """Keep each row's largest weights until their sum exceeds ``top_p``, the one that exceeds it included; renormalise.

    The mask depends on the values and has no gradient.
    """
    ordered, order = weights.detach().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(weights).scatter(-1, order, (before <= top_p).to(weights.dtype))
    pruned = weights * kept
    return pruned / pruned.sum(-1, keepdim=True)
