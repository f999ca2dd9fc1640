"""What layers read: maps and their figures for every LIMe model, and which tokens turn a dynamic router to which layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lime_dist.analysis.representations import Representations
from lime_dist.config.schema import ModelConfig
from lime_dist.export.exported import ExportedModel, model_config
from lime_dist.model.policies import Entry, make_policy
from lime_dist.monitor.routers import entropy, router_map, self_retrieval, shares

FREQUENT = 512
"""Token types, the most frequent ones of the samples, whose routes are looked at."""
LEAST = 8
"""Occurrences that a token type needs."""
ROUTES, TOKENS = 20, 8
"""How many routes are listed, and how many token types of each."""


@dataclass(frozen=True)
class Routes:
    """What the layers of one model read.

    Attributes:
        map: [L, L], see `router_map`; of a dynamic router with its mean weights over all tokens of the samples.
        self_retrieval: by layer, the share of what it reads that is its own.
        entropy: by layer, how widely it reads, in nats.
        distance: by layer, how many layers back it reads on average.
    """

    map: Tensor
    self_retrieval: Sequence[float]
    entropy: Sequence[float]
    distance: Sequence[float]


@dataclass(frozen=True)
class Route:
    """From one entry of the history to one head of a layer, in a dynamic router.

    Attributes:
        mean: the weight over all tokens.
        spread: the standard deviation of the weight's means by token type.
        tokens: (text, mean weight) of the token types that it is largest for.
    """

    layer: int
    head: int
    entry: str
    mean: float
    spread: float
    tokens: Sequence[tuple[str, float]]


class DynamicWeights:
    """Sums of a dynamic router's weights, over all tokens and by type of token.

    Args:
        types: the token types that are told apart.
    """

    def __init__(self, types: Sequence[int]) -> None:
        self.types = types
        self._place = torch.full((max(types, default=0) + 1,), -1)
        self._place[list(types)] = torch.arange(len(types))
        self._all: dict[int, Tensor] = {}
        self._by_type: dict[int, Tensor] = {}
        self._tokens = 0
        self._counts = torch.zeros(len(types), dtype=torch.float64)

    def add(self, sample: Representations) -> None:
        self._tokens += len(sample.tokens)
        known = sample.tokens < len(self._place)
        place = torch.where(known, self._place[sample.tokens.clamp_max(len(self._place) - 1)], -1)
        told = place >= 0
        self._counts += torch.bincount(place[told], minlength=len(self.types))
        for layer, weights in sample.routing.items():
            weights = weights.double()
            zeros = weights.new_zeros
            everything = self._all.setdefault(layer, zeros(weights.shape[1:]))
            everything += weights.sum(0)
            by_type = self._by_type.setdefault(layer, zeros((len(self.types), *weights.shape[1:])))
            by_type.index_add_(0, place[told], weights[told])

    def means(self) -> dict[int, Tensor]:
        """By layer, [H, entries read]."""
        return {layer: total / self._tokens for layer, total in self._all.items()}

    def routes(self, exported: ExportedModel) -> list[Route]:
        """The `ROUTES` routes whose weight depends most on the type of token, those first that do so most."""
        policy = make_policy(model_config(exported).lime)
        enough = self._counts >= LEAST
        if enough.sum() < 2:
            return []
        types = torch.tensor(self.types)[enough]
        found = []
        for layer, total in self._by_type.items():
            means = total[enough] / self._counts[enough].view(-1, 1, 1)
            spread = means.std(0)
            for flat in spread.flatten().argsort(descending=True)[:ROUTES].tolist():
                head, column = divmod(flat, spread.shape[1])
                found.append((spread[head, column].item(), layer, head, column, means[:, head, column]))
        found.sort(key=lambda route: -route[0])
        overall = self.means()
        listed = []
        for deviation, layer, head, column, by_type in found[:ROUTES]:
            order = by_type.argsort(descending=True)[:TOKENS].tolist()
            tokens = [(_text(exported, int(types[i])), by_type[i].item()) for i in order]
            name = _entry_name(policy.reads(layer)[column])
            listed.append(Route(layer, head, name, overall[layer][head, column].item(), deviation, tokens))
        return listed


def frequent_types(samples: Sequence[Tensor]) -> list[int]:
    """The most frequent token types, at most `FREQUENT`."""
    counts = torch.bincount(torch.cat(list(samples)))
    order = counts.argsort(descending=True, stable=True)[:FREQUENT]
    return order[counts[order] > 0].tolist()


def routes_of(exported: ExportedModel, dynamic: DynamicWeights) -> Routes | None:
    """None of a model without routers."""
    config = model_config(exported)
    if config.architecture != "lime":
        return None
    found = router_map(config, _weights(config, exported.model.state_dict(), dynamic.means()))
    parts = shares(found)
    layers = torch.arange(len(found), dtype=parts.dtype)
    distance = (parts * (layers.unsqueeze(1) - layers)).sum(-1).tolist()
    return Routes(found, self_retrieval(found), entropy(found), distance)


def _weights(config: ModelConfig, weights: Mapping[str, Any], dynamic: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """A map takes logits; those of mean weights are their logarithms."""
    found = {name: weight.cpu() for name, weight in weights.items()}
    for layer, mean in dynamic.items():
        found[f"model.layers.{layer}.self_attn.router.weight"] = mean.log()
    return found


def _entry_name(entry: Entry) -> str:
    if entry.is_summary:
        return f"summary {entry.row} of layers {entry.layers.start} to {entry.layers.stop - 1}"
    return f"input of layer {entry.layer}"


def _text(exported: ExportedModel, token: int) -> str:
    """A token as it stands in text; of one that is a part of a character, or none, its name in the vocabulary."""
    text: str = exported.tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(exported.tokenizer.convert_ids_to_tokens(token))
