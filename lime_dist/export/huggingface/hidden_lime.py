"""LIMe over hidden states: each head projects its keys and values from its own mixture of earlier layers' inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .history_lime import Entry, Reads, Summaries
from .layers_lime import Attention, ForwardPass, PreNormLayer, RMSNorm, rms_normalise
from .modeling_lime import BaseForCausalLM, BaseModel

MIXTURE_ELEMENTS = 1 << 24
"""Largest number of elements of per-head mixtures of hidden states computed at a time."""


class HiddenRouter(nn.Module):
    """Softmax weights over the entries read: the same for all tokens (w [H, E]), or per token (W [H·E, D], rows by head)."""

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


class HiddenHistory:
    """``routes: hidden``. An entry is [N, D], N = B·T: a layer's input, or a summary, divided by its root mean square."""

    def __init__(self, reads: Reads, summaries: Summaries, eps: float) -> None:
        self.reads, self.summaries, self.eps = reads, summaries, eps
        self.entries: dict[Entry, Tensor] = {}
        self.states: dict[Entry, Tensor] = {}  # layer inputs before the division, until their chunk is summarised

    def read(
        self, layer: int, attention: Attention, gamma: Tensor | None, x_BTD: Tensor, state_BTD: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Write a layer's input to the history and read the layer's entries.

        Args:
            gamma: weight of the layer's history norm; None: the layer has no router.
            x_BTD: the layer's input.
            state_BTD: the same divided by its root mean square.

        Returns:
            Keys and values, [B, H, T, d] each; None without a router.
        """
        self.entries["slots", layer] = state_BTD.flatten(0, 1)
        if ("slots", layer) in self.reads.summarised:
            self.states["slots", layer] = x_BTD.flatten(0, 1)
        keys_and_values = None
        if gamma is not None:
            keys_and_values = self._project(layer, attention, gamma, state_BTD)
        if layer in self.reads.chunks:
            chunk, sources, rows = self.reads.chunks[layer]
            weights = self.summaries.weight(chunk)
            shares = weights.to(torch.promote_types(weights.dtype, torch.float32)).softmax(-1)
            summary_rND = torch.zeros((), dtype=shares.dtype, device=shares.device)
            for i, entry in enumerate(sources):
                summary_rND = summary_rND + shares[:, i, None, None] * self.states.pop(entry).to(shares.device)
            self.entries.update(zip(rows, rms_normalise(summary_rND, self.eps).to(x_BTD.dtype), strict=True))
        for entry in self.reads.dropped[layer]:
            self.entries.pop(entry, None)
        return keys_and_values

    def _project(self, layer: int, attention: Attention, gamma: Tensor, state_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from each head's mixture of the layer's entries, a slice of tokens at a time."""
        batch, length, size = state_BTD.shape
        read = [self.entries[entry].to(state_BTD.device) for entry in self.reads.by_layer[layer]]
        weights = attention.router((state_BTD * gamma).flatten(0, 1))
        projections = [p().unflatten(0, (-1, attention.head_dim)) for p in (attention.k_proj, attention.v_proj)]
        projections_HcD = torch.cat(projections, 1) * gamma
        token_slices = []
        step = max(1, MIXTURE_ELEMENTS // (len(projections_HcD) * size))
        for begin in range(0, batch * length, step):
            tokens = slice(begin, begin + step)
            stacked_EnD = torch.stack([entry[tokens] for entry in read])
            if weights.dim() == 2:
                mixture_HnD = (weights @ stacked_EnD.flatten(1)).view(-1, *stacked_EnD.shape[1:])
            else:
                mixture_HnD = torch.bmm(weights[tokens], stacked_EnD.transpose(0, 1)).transpose(0, 1)
            token_slices.append(torch.bmm(mixture_HnD, projections_HcD.transpose(1, 2)))
        projected_HNc = torch.cat(token_slices, 1)
        key, value = projected_HNc.view(-1, batch, length, 2, attention.head_dim).transpose(0, 1).unbind(3)
        return key, value


class HiddenLayer(PreNormLayer):
    """``routes: hidden``: each head projects its keys and values from its own mixture of earlier layers' inputs."""

    def __init__(self, config: LimeConfig, layer: int, reads: Reads) -> None:
        is_reader = layer >= config.lime["start_layer"]
        super().__init__(config, layer, HiddenRouter(config, reads.by_layer[layer]) if is_reader else None)
        self.history_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if is_reader else None

    def forward(self, x_BTD: Tensor, history: HiddenHistory, run: ForwardPass) -> Tensor:
        attention, norm = self.self_attn, self.history_layernorm
        state = rms_normalise(x_BTD, self.input_layernorm.eps)
        normed = state * self.input_layernorm()
        mixed = history.read(self.layer, attention, None if norm is None else norm(), x_BTD, state)
        key, value = attention.keys_and_values(normed) if mixed is None else mixed
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class LimeModel(BaseModel):
    """Token ids to last hidden states."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        self.reads = Reads(config)
        return [HiddenLayer(config, layer, self.reads) for layer in range(config.num_hidden_layers)]

    def make_summaries(self, config: LimeConfig) -> nn.Module:
        return Summaries(config, heads=1)

    def open_history(self) -> HiddenHistory:
        return HiddenHistory(self.reads, cast(Summaries, self.history), self.config.rms_norm_eps)


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
