"""The routers of LIMe over hidden states, static and dynamic; their weights are a softmax over the entries read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StaticRouter(nn.Module):
    """softmax(w_ℓ) over the entries read, w_ℓ [H, E]; with ``top_p``, the smallest weights are dropped."""

    def __init__(self, num_heads: int, entries_read: int, top_p: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, entries_read))
        self.top_p = top_p

    def matrix(self) -> Tensor:
        """Weights [H, E], the same for every token."""
        weights = self.weight.softmax(-1)
        return weights if self.top_p is None or self.top_p == 1 else prune(weights, self.top_p)


class DynamicRouter(nn.Module):
    """softmax(W_ℓ·x) over the entries read, per token and head; W_ℓ [H·E, D], rows by head, then entry."""

    def __init__(self, num_heads: int, entries_read: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads * entries_read, hidden_size))
        self.num_heads = num_heads

    def matrix(self) -> None:
        """None: the weights depend on the layer's input."""

    def forward(self, state_ND: Tensor) -> Tensor:
        """Weights [N, H, E] from the layer's input after the history norm, [N, D]."""
        logits = nn.functional.linear(state_ND, self.weight)
        return logits.view(len(state_ND), self.num_heads, -1).softmax(-1)


def prune(weights: Tensor, top_p: float) -> Tensor:
    """Keep each row's largest weights, up to and including the one whose sum exceeds ``top_p``, and renormalise.

    The gradient does not pass through the choice of the weights.
    """
    ordered, order = weights.detach().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(weights).scatter(-1, order, (before <= top_p).to(weights.dtype))
    pruned = weights * kept
    return pruned / pruned.sum(-1, keepdim=True)
