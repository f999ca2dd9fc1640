"""Mixture-of-depths attention (MoDA, arXiv 2603.15619): attention also reads earlier layers' keys and values at the same token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .history_lime import Entry, Reads, Summaries
from .layers_lime import MLP, ForwardPass, PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel

WINDOW = 256
"""Queries whose scores exist at the same time."""


class DepthHistory:
    """Keys before rotation, and values, of earlier layers: entries [pairs, 2, B, G, T, d], for the tokens at hand alone. The second
    pair, if there is one, is of the layer's MLP."""

    def __init__(self, reads: Reads, summaries: Summaries) -> None:
        self.reads, self.summaries = reads, summaries
        self.entries: dict[Entry, Tensor] = {}

    def read(self, layer: int, device: torch.device) -> list[Tensor]:
        """The pairs of keys and values that a layer reads of earlier layers, [2, B, G, T, d] each."""
        others = self.reads.by_layer[layer][:-1]
        return [pair for entry in others for pair in self.entries[entry].to(device)]

    def write(self, layer: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Take the pairs of a layer, and the summary of a chunk that ends with it."""
        if layer in self.reads.summarised_or_read:
            self.entries["slots", layer] = torch.stack([torch.stack(pair) for pair in pairs])
        if layer in self.reads.chunks:
            chunk, sources, rows = self.reads.chunks[layer]
            weight = self.summaries.weight(chunk)
            slots = torch.stack([self.entries[entry].to(weight.device) for entry in sources])
            summary = (weight @ slots.flatten(1)).unflatten(1, slots.shape[1:])
            self.entries.update(zip(rows, summary, strict=True))
        for entry in self.reads.dropped[layer]:
            self.entries.pop(entry, None)


class KeyValueMLP(MLP):
    """SwiGLU, with a projection of its input to keys and values that later layers read."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.k_proj, self.v_proj = (
            nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False) for _ in range(2)
        )


class DepthAttentionLayer(PreNormLayer):
    """Attention and SwiGLU. Attention is one softmax over the sequence and over what the layer reads of earlier layers,
    ``num_entries`` entries."""

    def __init__(self, config: LimeConfig, layer: int, reads: Reads) -> None:
        super().__init__(config, layer, None)
        self.num_entries = len(reads.by_layer[layer]) - 1
        if config.lime["mlp_entries"] and layer in reads.summarised_or_read:
            self.mlp = KeyValueMLP(config)

    def forward(self, x_BTD: Tensor, history: DepthHistory, run: ForwardPass) -> Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x_BTD)
        key, value = attention.keys_and_values(normed)
        query, key = attention.normed(attention.queries(normed), key)
        others = history.read(self.layer, x_BTD.device)
        x_BTD = x_BTD + self.checkpointed(self._attend, run, query, key, value, *others)
        normed, pairs = self.post_attention_layernorm(x_BTD), [(key, value)]
        if isinstance(self.mlp, KeyValueMLP):
            key, value = (attention.split_heads(each(normed)) for each in (self.mlp.k_proj, self.mlp.v_proj))
            pairs.append((key if attention.k_norm is None else attention.k_norm(key), value))
        history.write(self.layer, pairs)
        return x_BTD + self.checkpointed(self._feed_forward, run, normed)

    def _feed_forward(self, run: ForwardPass, normed_BTD: Tensor) -> Tensor:
        return self.mlp(normed_BTD)

    def _attend(self, run: ForwardPass, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, *others: Tensor) -> Tensor:
        if not others:
            return run.attend_normed(self.layer, self.self_attn, q_BHTd, k_BGTd, v_BGTd)
        keys_CBGTd, values_CBGTd = torch.stack(others).unbind(1)
        # At one token the rotations of query and key cancel.
        depth_BGRTC = torch.einsum("bgrtd,cbgtd->bgrtc", q_BHTd.unflatten(1, (k_BGTd.shape[1], -1)), keys_CBGTd)
        q_BHTd, k_BGSd, v_BGSd, mask, is_causal = run.with_past(self.layer, q_BHTd, k_BGTd, v_BGTd)
        length, total = q_BHTd.shape[2], k_BGSd.shape[2]
        if is_causal:
            mask = torch.ones(length, total, dtype=torch.bool, device=q_BHTd.device).tril()
        kept, outs = [], []
        for begin in range(0, length, WINDOW):
            window = slice(begin, min(begin + WINDOW, length))
            weights = _shares(
                q_BHTd[:, :, window],
                k_BGSd,
                depth_BGRTC[:, :, :, window],
                mask if mask is None or mask.shape[-2] == 1 else mask[..., window, :],
            )
            sequence, depth = weights.split([total, len(others)], -1)
            outs.append(
                (sequence.flatten(2, 3) @ v_BGSd).unflatten(2, sequence.shape[2:4])
                + torch.einsum("bgrtc,cbgtd->bgrtd", depth, values_CBGTd[:, :, :, window])
            )
            kept.append(weights)
        if run.attentions is not None:
            run.attentions.append(torch.cat(kept, 3).flatten(1, 2))
        return self.self_attn.output(torch.cat(outs, 3).flatten(1, 2))


def _shares(q_BHTd: Tensor, k_BGSd: Tensor, depth_BGRTC: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax over the sequence's keys and those of earlier layers, [B, G, R, T, S + C]."""
    q_BGRTd = q_BHTd.unflatten(1, (k_BGSd.shape[1], -1))
    scores = (q_BGRTd.flatten(2, 3) @ k_BGSd.mT).unflatten(2, q_BGRTd.shape[2:4]) * q_BHTd.shape[-1] ** -0.5
    if mask is not None:
        mask = mask.unsqueeze(-4) if mask.dim() == 4 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    both = torch.cat([scores, depth_BGRTC * q_BHTd.shape[-1] ** -0.5], -1)
    return both.softmax(-1, dtype=torch.promote_types(both.dtype, torch.float32)).to(q_BHTd.dtype)


class LimeModel(BaseModel):
    """Token ids to last hidden states. A token reads earlier layers at itself alone, so the cache is LLaMA's. With
    ``output_attentions``, the columns of earlier layers follow those of the sequence."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        self.reads = Reads(config)
        return [DepthAttentionLayer(config, layer, self.reads) for layer in range(config.num_hidden_layers)]

    def make_summaries(self, config: LimeConfig) -> nn.Module:
        return Summaries(config, 1)

    def open_history(self) -> DepthHistory:
        return DepthHistory(self.reads, cast(Summaries, self.history))


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
