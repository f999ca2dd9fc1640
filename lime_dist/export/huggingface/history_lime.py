"""The layer history of the tokens of one forward pass: what each layer leaves, and the mixtures that later layers read.

Only tokens that are new have a history. What a layer read for past tokens is in the key/value cache, mixed already.
Entries are dropped as soon as no later layer reads them. Differentiable; a layer's reads are copied together for its product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import Attention, rms_normalise

Entry = tuple[str, int]
"""("slots", layer) or ("summaries", row)."""

MIXTURE_ELEMENTS = 1 << 24
"""Elements of per-head mixtures of hidden states that are made at a time."""


class Reads:
    """What the layers read, from a configuration.

    Attributes:
        by_layer: entries in the order of the router's columns.
        chunks: by last layer: the chunk's number, its slots, its summary rows.
        summed_up: the slots of all chunks.
        dropped: by layer: entries that nobody reads after it.
    """

    def __init__(self, config: LimeConfig) -> None:
        self.by_layer: list[list[Entry]] = [
            [(kind, index) for kind, begin, end in runs for index in range(begin, end)] for runs in config.reads
        ]
        self.chunks: dict[int, tuple[int, list[Entry], list[Entry]]] = {}
        rows = 0
        for number, (begin, end, rank) in enumerate(config.chunks):
            sources: list[Entry] = [("slots", layer) for layer in range(begin, end)]
            summary: list[Entry] = [("summaries", row) for row in range(rows, rows + rank)]
            self.chunks[end - 1] = (number, sources, summary)
            rows += rank
        self.summed_up = {entry for _, sources, _ in self.chunks.values() for entry in sources}
        last: dict[Entry, int] = {}
        for layer, entries in enumerate(self.by_layer):
            own: list[Entry] = [("slots", layer)]
            last.update(
                dict.fromkeys([*own, *entries, *(self.chunks[layer][1] if layer in self.chunks else [])], layer)
            )
        self.dropped: list[list[Entry]] = [[] for _ in self.by_layer]
        for entry, layer in last.items():
            self.dropped[layer].append(entry)


class KeyValueRouter(nn.Module):
    """Signed weights over the heads of every entry read: [P | Q | R], see the parts' names. Starts as no mixture at all."""

    def __init__(self, heads: int, reads: list[Entry]) -> None:
        super().__init__()
        summaries = [index for index, (kind, _) in enumerate(reads) if kind == "summaries"]
        begin, end = (summaries[0], summaries[-1] + 1) if summaries else (0, 0)
        self.first_weight = self.summary_weight = None
        if begin:
            self.first_weight = nn.Parameter(torch.zeros(heads, begin * heads))
        if summaries:
            self.summary_weight = nn.Parameter(torch.zeros(heads, (end - begin) * heads))
        own = (len(reads) - end) * heads
        self.weight = nn.Parameter(torch.eye(own)[own - heads :])

    def matrix(self) -> Tensor:
        """[G, entries read · G]."""
        return torch.cat([p for p in (self.first_weight, self.summary_weight, self.weight) if p is not None], 1)


class HiddenRouter(nn.Module):
    """A softmax over the entries read, the same for all tokens (w [H, E]) or per token (W [H·E, D], rows by head)."""

    def __init__(self, config: LimeConfig, reads: list[Entry]) -> None:
        super().__init__()
        self.heads, self.top_p = config.num_attention_heads, config.lime.get("top_p")
        self.is_dynamic = config.lime.get("router") == "dynamic"
        shape = (self.heads * len(reads), config.hidden_size) if self.is_dynamic else (self.heads, len(reads))
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, state_ND: Tensor) -> Tensor:
        """[H, E], or [N, H, E] from the layer's own state under the history norm."""
        if self.is_dynamic:
            return nn.functional.linear(state_ND, self.weight).view(len(state_ND), self.heads, -1).softmax(-1)
        weights = self.weight.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return weights
        ordered, order = weights.detach().sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(weights).scatter(-1, order, (before <= self.top_p).to(weights.dtype))
        return weights * kept / (weights * kept).sum(-1, keepdim=True)


class ChunkSummary(nn.Module):
    """How the slots of a chunk of layers are summed up: signed weights (kv), or the logits of a softmax (hidden)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(rows, columns))


class Summaries(nn.Module):
    """The weights of all chunk summaries."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        heads = config.num_key_value_heads if config.lime.get("routes") == "kv" else 1
        self.chunks = nn.ModuleList(
            ChunkSummary(rank * heads, (end - begin) * heads) for begin, end, rank in config.chunks
        )

    def weight(self, chunk: int) -> Tensor:
        return self.chunks[chunk].get_parameter("weight")


class KeyValueHistory:
    """``routes: kv``. An entry is [G, B·T·2d]: a layer's own keys and values before rotation, or a row of a summary."""

    def __init__(self, reads: Reads, summaries: Summaries) -> None:
        self.reads, self.summaries = reads, summaries
        self.entries: dict[Entry, Tensor] = {}

    def mix(self, layer: int, router: KeyValueRouter | None, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Leave a layer's keys and values, and return what its attention reads, [B, G, T, d] each."""
        batch, heads, length, size = k_BGTd.shape
        self.entries["slots", layer] = torch.cat((k_BGTd, v_BGTd), -1).transpose(0, 1).reshape(heads, -1)
        if router is not None:
            mixed = router.matrix() @ self._gather(self.reads.by_layer[layer])
            k_BGTd, v_BGTd = mixed.view(heads, batch, length, 2 * size).transpose(0, 1).split(size, -1)
        if layer in self.reads.chunks:
            number, sources, rows = self.reads.chunks[layer]
            summary = self.summaries.weight(number) @ self._gather(sources)
            self.entries.update(zip(rows, summary.view(len(rows), heads, -1), strict=True))
        for entry in self.reads.dropped[layer]:
            self.entries.pop(entry, None)
        return k_BGTd, v_BGTd

    def _gather(self, entries: list[Entry]) -> Tensor:
        """[entries · G, B·T·2d]."""
        return torch.cat([self.entries[entry] for entry in entries])


class HiddenHistory:
    """``routes: hidden``. An entry is [N, D], N = B·T: a layer's input, or a summary, divided by its root mean square."""

    def __init__(self, reads: Reads, summaries: Summaries, eps: float) -> None:
        self.reads, self.summaries, self.eps = reads, summaries, eps
        self.entries: dict[Entry, Tensor] = {}
        self.states: dict[Entry, Tensor] = {}  # as they are, until their chunk is summed up

    def read(
        self, layer: int, attention: Attention, gamma: Tensor | None, x_BTD: Tensor, state_BTD: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Leave a layer's input (``x``, and ``state``: divided by its root mean square); keys and values from what the layer
        reads under its history norm ``gamma``, [B, H, T, d] each, or None without a router."""
        self.entries["slots", layer] = state_BTD.flatten(0, 1)
        if ("slots", layer) in self.reads.summed_up:
            self.states["slots", layer] = x_BTD.flatten(0, 1)
        found = None
        if gamma is not None:
            found = self._project(layer, attention, gamma, state_BTD)
        if layer in self.reads.chunks:
            number, sources, rows = self.reads.chunks[layer]
            weights = self.summaries.weight(number)
            shares = weights.to(torch.promote_types(weights.dtype, torch.float32)).softmax(-1)
            summary_rND = torch.zeros((), dtype=shares.dtype, device=shares.device)
            for i, entry in enumerate(sources):
                summary_rND = summary_rND + shares[:, i, None, None] * self.states.pop(entry)
            self.entries.update(zip(rows, rms_normalise(summary_rND, self.eps).to(x_BTD.dtype), strict=True))
        for entry in self.reads.dropped[layer]:
            self.entries.pop(entry, None)
        return found

    def _project(self, layer: int, attention: Attention, gamma: Tensor, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, size = state_BTD.shape
        read = [self.entries[entry] for entry in self.reads.by_layer[layer]]
        weights = attention.router((state_BTD * gamma).flatten(0, 1))
        projections = [p.weight.unflatten(0, (-1, attention.head_dim)) for p in (attention.k_proj, attention.v_proj)]
        projections_HcD = torch.cat(projections, 1) * gamma
        pieces = []
        step = max(1, MIXTURE_ELEMENTS // (len(projections_HcD) * size))
        for begin in range(0, batch * length, step):
            tokens = slice(begin, begin + step)
            stacked_EnD = torch.stack([entry[tokens] for entry in read])
            if weights.dim() == 2:
                mixture_HnD = (weights @ stacked_EnD.flatten(1)).view(-1, *stacked_EnD.shape[1:])
            else:
                mixture_HnD = torch.bmm(weights[tokens], stacked_EnD.transpose(0, 1)).transpose(0, 1)
            pieces.append(torch.bmm(mixture_HnD, projections_HcD.transpose(1, 2)))
        projected_HNc = torch.cat(pieces, 1)
        key, value = projected_HNc.view(-1, batch, length, 2, attention.head_dim).transpose(0, 1).unbind(3)
        return key, value
