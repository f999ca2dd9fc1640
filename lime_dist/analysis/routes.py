"""What layers read: a map with its statistics for every LIMe model, and for dynamic routers how reads depend on the token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lime_dist.analysis.representations import Representations, readers_over_depth
from lime_dist.config.schema import ModelConfig
from lime_dist.export.exported import ExportedModel, model_config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.policies import Entry, make_policy
from lime_dist.monitor.routers import entropy, router_map, self_retrieval, shares

FREQUENT = 512
"""Number of token types, the most frequent ones in the samples, whose routes are compared."""
MIN_OCCURRENCES = 8
"""Occurrences that a token type needs."""
ROUTES, TOKENS = 20, 8
"""Number of routes to list, and of token types for each."""


@dataclass(frozen=True)
class Routes:
    """What the layers of one model read.

    Attributes:
        map: [L, L], see `router_map`; of the mean weights over all tokens of the samples if the router is dynamic.
        self_retrieval: by layer, the share of its reads that comes from the layer itself.
        entropy: by layer, the entropy of its reads, in nats.
        distance: by layer, the mean distance of its reads, in layers.
    """

    map: Tensor
    self_retrieval: Sequence[float]
    entropy: Sequence[float]
    distance: Sequence[float]


@dataclass(frozen=True)
class Route:
    """A connection from one entry of the history to one head of a layer, in a dynamic router.

    Attributes:
        mean: mean weight over all tokens.
        spread: standard deviation, over token types, of the mean weight.
        tokens: (text, mean weight) of the token types with the largest mean weights.
    """

    layer: int
    head: int
    entry: str
    mean: float
    spread: float
    tokens: Sequence[tuple[str, float]]


class DynamicWeights:
    """Sums of a dynamic router's weights, over all tokens and by token type.

    Args:
        types: token types to sum separately.
    """

    def __init__(self, types: Sequence[int]) -> None:
        self.types = types
        self._index = torch.full((max(types, default=0) + 1,), -1)
        self._index[list(types)] = torch.arange(len(types))
        self._all: dict[int, Tensor] = {}
        self._by_type: dict[int, Tensor] = {}
        self._tokens = 0
        self._counts = torch.zeros(len(types), dtype=torch.float64)

    def add(self, sample: Representations) -> None:
        self._tokens += len(sample.tokens)
        in_table = sample.tokens < len(self._index)
        index = torch.where(in_table, self._index[sample.tokens.clamp_max(len(self._index) - 1)], -1)
        selected = index >= 0
        self._counts += torch.bincount(index[selected], minlength=len(self.types))
        for layer, weights in sample.routing.items():
            weights = weights.double()
            zeros = weights.new_zeros
            everything = self._all.setdefault(layer, zeros(weights.shape[1:]))
            everything += weights.sum(0)
            by_type = self._by_type.setdefault(layer, zeros((len(self.types), *weights.shape[1:])))
            by_type.index_add_(0, index[selected], weights[selected])

    def means(self) -> dict[int, Tensor]:
        """Mean weights over all tokens by layer, [H, entries read]."""
        return {layer: total / self._tokens for layer, total in self._all.items()}

    def routes(self, exported: ExportedModel) -> list[Route]:
        """The `ROUTES` routes whose weight depends most on the token type, in descending order of that."""
        policy, slot = (
            make_policy(model_config(exported).lime),
            "keys of" if readers_over_depth(exported) else "input of",
        )
        enough = self._counts >= MIN_OCCURRENCES
        if enough.sum() < 2:
            return []
        types = torch.tensor(self.types)[enough]
        candidates = []
        for layer, total in self._by_type.items():
            means = total[enough] / self._counts[enough].view(-1, 1, 1)
            spread = means.std(0)
            for flat in spread.flatten().argsort(descending=True)[:ROUTES].tolist():
                head, column = divmod(flat, spread.shape[1])
                candidates.append((spread[head, column].item(), layer, head, column, means[:, head, column]))
        candidates.sort(key=lambda route: -route[0])
        overall = self.means()
        listed = []
        for deviation, layer, head, column, by_type in candidates[:ROUTES]:
            order = by_type.argsort(descending=True)[:TOKENS].tolist()
            tokens = [(_text(exported, int(types[i])), by_type[i].item()) for i in order]
            name = _entry_name(policy.reads(layer)[column], slot)
            listed.append(Route(layer, head, name, overall[layer][head, column].item(), deviation, tokens))
        return listed


def frequent_types(samples: Sequence[Tensor]) -> list[int]:
    """The most frequent token types, at most `FREQUENT`."""
    counts = torch.bincount(torch.cat(list(samples)))
    order = counts.argsort(descending=True, stable=True)[:FREQUENT]
    return order[counts[order] > 0].tolist()


def routes_of(exported: ExportedModel, dynamic: DynamicWeights) -> Routes | None:
    """What the layers of a model read; None if it has no routers."""
    config = model_config(exported)
    if not (architecture_of(config).router_parameters or dynamic.means()):
        return None
    map_LL = router_map(config, _weights(config, exported.model.state_dict(), dynamic.means()))
    parts = shares(map_LL)
    layers = torch.arange(len(map_LL), dtype=parts.dtype)
    distance = (parts * (layers.unsqueeze(1) - layers)).sum(-1).tolist()
    return Routes(map_LL, self_retrieval(map_LL), entropy(map_LL), distance)


def _weights(config: ModelConfig, weights: Mapping[str, Any], dynamic: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The weights for a map, with those of a dynamic router replaced by logits: the logarithms of its mean weights."""
    for_map = {name: weight.cpu() for name, weight in weights.items()}
    for layer, mean in dynamic.items():
        for_map[f"model.layers.{layer}.self_attn.router.weight"] = mean.log()
    return for_map


def _entry_name(entry: Entry, slot: str) -> str:
    if entry.is_summary:
        return f"summary {entry.row} of layers {entry.layers.start} to {entry.layers.stop - 1}"
    return f"{slot} layer {entry.layer}"


def _text(exported: ExportedModel, token: int) -> str:
    """The text of a token, or its name in the vocabulary if it is empty or only a part of a character."""
    text: str = exported.tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(exported.tokenizer.convert_ids_to_tokens(token))
