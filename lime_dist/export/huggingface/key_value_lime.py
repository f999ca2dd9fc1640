"""LIMe over keys and values: a layer's keys and values are mixed with those of earlier layers before rotation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .history_lime import Entry, Reads, Summaries
from .layers_lime import ForwardPass, PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel


class KeyValueRouter(nn.Module):
    """Signed weights over the heads of every entry read: [P | Q | R] for the first slots, summaries, and the other slots.

    The initial values select the layer's own keys and values.
    """

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

    def forward(self) -> Tensor:
        """[G, entries read · G]."""
        return torch.cat([p for p in (self.first_weight, self.summary_weight, self.weight) if p is not None], 1)


class KeyValueHistory:
    """``routes: kv``. An entry is [G, B·T·2d]: a layer's own keys and values before rotation, or a row of a summary."""

    def __init__(self, reads: Reads, summaries: Summaries) -> None:
        self.reads, self.summaries = reads, summaries
        self.entries: dict[Entry, Tensor] = {}

    def mix(self, layer: int, router: KeyValueRouter | None, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values to the history and return the mixtures that attention reads, [B, G, T, d] each."""
        batch, heads, length, size = k_BGTd.shape
        self.entries["slots", layer] = torch.cat((k_BGTd, v_BGTd), -1).transpose(0, 1).reshape(heads, -1)
        if router is not None:
            mixed = router() @ self._gather(self.reads.by_layer[layer], k_BGTd.device)
            k_BGTd, v_BGTd = mixed.view(heads, batch, length, 2 * size).transpose(0, 1).split(size, -1)
        if layer in self.reads.chunks:
            chunk, sources, rows = self.reads.chunks[layer]
            weight = self.summaries.weight(chunk)
            summary = weight @ self._gather(sources, weight.device)
            self.entries.update(zip(rows, summary.view(len(rows), heads, -1), strict=True))
        for entry in self.reads.dropped[layer]:
            self.entries.pop(entry, None)
        return k_BGTd, v_BGTd

    def _gather(self, entries: list[Entry], device: torch.device) -> Tensor:
        """The entries, stacked, [entries · G, B·T·2d]. Layers may lie on several devices."""
        return torch.cat([self.entries[entry].to(device) for entry in entries])


class KeyValueLayer(PreNormLayer):
    """``routes: kv``: keys and values are mixed with those of earlier layers before rotation."""

    def __init__(self, config: LimeConfig, layer: int, reads: Reads) -> None:
        router = KeyValueRouter(config.num_key_value_heads, reads.by_layer[layer]) if layer else None
        super().__init__(config, layer, router)

    def forward(self, x_BTD: Tensor, history: KeyValueHistory, run: ForwardPass) -> Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x_BTD)
        key, value = history.mix(self.layer, attention.router, *attention.keys_and_values(normed))
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        self.reads = Reads(config)
        return [KeyValueLayer(config, layer, self.reads) for layer in range(config.num_hidden_layers)]

    def make_summaries(self, config: LimeConfig) -> nn.Module:
        return Summaries(config, config.num_key_value_heads)

    def open_history(self) -> KeyValueHistory:
        return KeyValueHistory(self.reads, cast(Summaries, self.history))


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
