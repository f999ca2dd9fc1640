"""What layers read: a map with its statistics for every model with weights over depth, and how reads depend on the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lime_dist.analysis.representations import Representations
from lime_dist.export.exported import ExportedModel, model_config
from lime_dist.model.architecture import architecture_of, mean_weights_name
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
        map: [L, columns], see `router_map`; of the mean weights over all tokens of the samples if they depend on the token.
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
    """A connection from one entry of the history to one reader, whose weight depends on the token.

    Attributes:
        reader: a head of a layer, or a read.
        mean: mean weight over all tokens.
        spread: standard deviation, over token types, of the mean weight.
        tokens: (text, mean weight) of the token types with the largest mean weights.
    """

    layer: int
    reader: str
    entry: str
    mean: float
    spread: float
    tokens: Sequence[tuple[str, float]]


class DynamicWeights:
    """Sums of weights that depend on the token, over all tokens and by token type.

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
        """Mean weights over all tokens by layer, [heads or reads, entries read]."""
        return {layer: total / self._tokens for layer, total in self._all.items()}

    def routes(self, exported: ExportedModel) -> list[Route]:
        """The `ROUTES` routes whose weight depends most on the token type, in descending order of that."""
        architecture = architecture_of(model_config(exported))
        enough = self._counts >= MIN_OCCURRENCES
        if enough.sum() < 2:
            return []
        types = torch.tensor(self.types)[enough]
        candidates = []
        for layer, total in self._by_type.items():
            means = total[enough] / self._counts[enough].view(-1, 1, 1)
            spread = means.std(0)
            for flat in spread.flatten().argsort(descending=True)[:ROUTES].tolist():
                row, column = divmod(flat, spread.shape[1])
                candidates.append((spread[row, column].item(), layer, row, column, means[:, row, column]))
        candidates.sort(key=lambda route: -route[0])
        overall = self.means()
        listed = []
        for deviation, layer, row, column, by_type in candidates[:ROUTES]:
            order = by_type.argsort(descending=True)[:TOKENS].tolist()
            tokens = [(_text(exported, int(types[i])), by_type[i].item()) for i in order]
            reader, entry = architecture.row_name(layer, row), architecture.column_name(layer, column)
            listed.append(Route(layer, reader, entry, overall[layer][row, column].item(), deviation, tokens))
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
    weights = {name: weight.cpu() for name, weight in exported.model.state_dict().items()}
    weights |= {mean_weights_name(layer): mean for layer, mean in dynamic.means().items()}
    map_LC = router_map(config, weights)
    parts = shares(map_LC)
    layers = torch.arange(len(map_LC), dtype=parts.dtype).unsqueeze(1)
    columns = torch.arange(map_LC.shape[1], dtype=parts.dtype) + architecture_of(config).first_column
    distance = (parts * (layers - columns)).sum(-1).tolist()
    return Routes(map_LC, self_retrieval(map_LC), entropy(map_LC), distance)


def _text(exported: ExportedModel, token: int) -> str:
    """The text of a token, or its name in the vocabulary if it is empty or only a part of a character."""
    text: str = exported.tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(exported.tokenizer.convert_ids_to_tokens(token))
