"""The models written from their equations with plain loops: slow and easy to check.

From lime_dist's model code it uses only a history policy's ``reads``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.policies import Entry, make_policy

Weights = Mapping[str, Tensor]


def logits(config: ModelConfig, weights: Weights, tokens_BT: Tensor) -> Tensor:
    """Return the logits [B, T, V] of the decoder with these weights, by exported name."""
    x = weights["model.embed_tokens.weight"][tokens_BT]
    slots: dict[Entry, tuple[Tensor, Tensor]] = {}
    if config.architecture == "hyper" and config.hyper.connection == "free":
        return hyper_logits(config, weights, x)
    if config.architecture == "hyper":
        return constrained_logits(config, weights, x)
    if config.architecture == "attention_residuals":
        return attention_residuals_logits(config, weights, x)
    if config.architecture == "lime" and config.lime.routes == "hidden":
        return hidden_logits(config, weights, x)
    if config.architecture == "lime" and config.lime.depth_attention == "moda":
        return moda_logits(config, weights, x)
    if config.architecture == "gated_residual":
        return gated_logits(config, weights, x)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(config, weights, prefix, layer, normed, slots)
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mlp(config, weights, prefix, normed)
    return head(config, weights, x)


def hidden_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """LIMe with ``routes: hidden``."""
    lime, heads, size = config.lime, config.num_attention_heads, config.head_size
    states: dict[Entry, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for m, entry in summaries_after(config, layer - 1):
            shares = weights[f"model.history.chunks.{m}.weight"][entry.row].softmax(-1)
            parts = [share * states[Entry(one)] for share, one in zip(shares, entry.layers, strict=True)]
            states[entry] = sum(parts, torch.zeros_like(x))
        states[Entry(layer)] = x
        queries = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        key_weight, value_weight = (weights[prefix + f"self_attn.{kind}_proj.weight"] for kind in "kv")
        keys, values = [], []
        for h in range(heads):
            mixture = queries
            if layer >= lime.start_layer:
                gamma, router = (
                    weights[prefix + "history_layernorm.weight"],
                    weights[prefix + "self_attn.router.weight"],
                )
                read = make_policy(lime).reads(layer)
                normed = [rms_norm(states[entry], gamma, config.rms_norm_eps) for entry in read]
                if lime.router == "dynamic":
                    rows = router[h * len(read) : (h + 1) * len(read)]
                    logits = [(normed[-1] * row).sum(-1, keepdim=True) for row in rows]
                    shares = list(torch.cat(logits, -1).softmax(-1).unsqueeze(-1).unbind(-2))
                else:
                    shares = list(top_p(router[h].softmax(-1), lime.top_p))
                mixture = sum((share * state for share, state in zip(shares, normed, strict=True)), torch.zeros_like(x))
            keys.append(mixture @ key_weight[h * size : (h + 1) * size].T)
            values.append(mixture @ value_weight[h * size : (h + 1) * size].T)
        q = (queries @ weights[prefix + "self_attn.q_proj.weight"].T).unflatten(-1, (heads, size))
        x = x + causal(config, weights, prefix, q, torch.stack(keys, 2), torch.stack(values, 2)) @ weights[
            prefix + "self_attn.o_proj.weight"
        ].T * branch_scale(config)
        normed_x = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mlp(config, weights, prefix, normed_x)
    return head(config, weights, x)


def moda_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Mixture-of-depths attention (arXiv 2603.15619): head by head and token by token, one softmax over the sequence's keys of the
    layer and over earlier layers' keys at the token."""
    heads, groups, size = config.num_attention_heads, config.key_value_heads, config.head_size
    entries: dict[Entry, list[tuple[Tensor, Tensor]]] = {}  # keys and values [B, T, G, d] of attention, then of the MLP
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for m, entry in summaries_after(config, layer - 1):
            row = weights[f"model.history.chunks.{m}.weight"][entry.row]
            sources = [entries[Entry(one)] for one in entry.layers]
            entries[entry] = [
                tuple(sum(a * slot[pair][part] for a, slot in zip(row, sources, strict=True)) for part in (0, 1))
                for pair in range(len(sources[0]))
            ]
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        q = (normed @ weights[prefix + "self_attn.q_proj.weight"].T).unflatten(-1, (heads, size))
        q = rotate(head_norm(config, weights, prefix + "self_attn.q_norm.weight", q), config)
        own = key_and_value(config, weights, prefix, "self_attn.", normed)
        read = make_policy(config.lime).reads(layer)
        others = [pair for entry in read if entry != Entry(layer) for pair in entries[entry]]
        outputs = []
        for h in range(heads):
            g, rows = h // (heads // groups), []
            for t in range(x.shape[1]):
                keys = [own[0][:, s, g] for s in range(t + 1)] + [key[:, t, g] for key, _ in others]
                values = [own[1][:, s, g] for s in range(t + 1)] + [value[:, t, g] for _, value in others]
                shares = torch.stack([(q[:, t, h] * key).sum(-1) / size**0.5 for key in keys]).softmax(0)
                rows.append((shares.unsqueeze(-1) * torch.stack(values)).sum(0))
            outputs.append(torch.stack(rows, 1))
        x = x + branch_scale(config) * (torch.cat(outputs, -1) @ weights[prefix + "self_attn.o_proj.weight"].T)
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        entries[Entry(layer)] = [own]
        if prefix + "mlp.k_proj.weight" in weights:
            entries[Entry(layer)].append(key_and_value(config, weights, prefix, "mlp.", normed))
        x = x + mlp(config, weights, prefix, normed)
    return head(config, weights, x)


def key_and_value(config: ModelConfig, weights: Weights, prefix: str, part: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys and values, [B, T, G, d] each."""
    key, value = (
        (x @ weights[f"{prefix}{part}{kind}_proj.weight"].T).unflatten(-1, (config.key_value_heads, config.head_size))
        for kind in "kv"
    )
    return rotate(head_norm(config, weights, prefix + "self_attn.k_norm.weight", key), config), value


def head_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """x with every head normed, if the model does that."""
    return rms_norm(x, weights[name], config.rms_norm_eps) if config.numerics.qk_norm else x


def top_p(shares: Tensor, limit: float | None) -> Tensor:
    """Keep the largest shares until their sum exceeds the limit, set the others to 0, and renormalise."""
    if limit is None:
        return shares
    kept, total = torch.zeros_like(shares), 0.0
    for index in sorted(range(len(shares)), key=lambda i: -shares[i].item()):
        kept[index] = 1.0
        total += shares[index].item()
        if total > limit:
            break
    return shares * kept / (shares * kept).sum()


def hyper_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Hyper-Connections (arXiv 2409.19606), one stream and one coefficient at a time."""
    rate = config.hyper.rate
    streams = [x] * rate
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for kind in ("attn", "mlp"):
            own = f"{prefix}{kind}_connection."
            alpha = [[weights[own + "static_alpha"][i, j] for j in range(rate + 1)] for i in range(rate)]
            beta = [weights[own + "static_beta"][i] for i in range(rate)]
            if config.hyper.dynamic:
                for i in range(rate):
                    normed = layer_norm(streams[i])
                    for j in range(rate + 1):
                        logit = (normed * weights[own + "dynamic_alpha"][:, j]).sum(-1, keepdim=True)
                        alpha[i][j] = alpha[i][j] + weights[own + "alpha_scale"] * torch.tanh(logit)
                    logit = (normed * weights[own + "dynamic_beta"]).sum(-1, keepdim=True)
                    beta[i] = beta[i] + weights[own + "beta_scale"] * torch.tanh(logit)
            mixed = [sum((alpha[i][j] * streams[i] for i in range(rate)), torch.zeros_like(x)) for j in range(rate + 1)]
            normed = layer_norm(mixed[0])
            if kind == "attn":
                out = attention(config, weights, prefix, layer, normed, {})
            else:
                out = mlp(config, weights, prefix, normed)
            streams = [mixed[i + 1] + beta[i] * out for i in range(rate)]
    return head(config, weights, sum(streams, torch.zeros_like(x)))


def constrained_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """mHC (arXiv 2512.24880) and mHC-lite (arXiv 2601.05732), one stream and one coefficient at a time."""
    rate, eps = config.hyper.rate, config.rms_norm_eps
    streams = [x] * rate
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for kind, norm in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            own = f"{prefix}{kind}_connection."
            vector = torch.cat(streams, -1)
            normed = vector / (vector.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            numbers = normed @ weights[own + "mapping_proj.weight"].T
            z = []
            for index in range(numbers.shape[-1]):
                scale = weights[own + "scales"][min(index // rate, 2)]
                z.append(scale * numbers[..., index, None] + weights[own + "static_bias"][index])
            pre, post = (
                [1 / (1 + torch.exp(-z[i])) for i in range(rate)],
                [2 / (1 + torch.exp(-z[rate + i])) for i in range(rate)],
            )
            residual = (sinkhorn if config.hyper.connection == "doubly_stochastic" else permuted)(z[2 * rate :], rate)
            mixed = sum((pre[i] * streams[i] for i in range(rate)), torch.zeros_like(x))
            mixed = rms_norm(mixed, weights[f"{prefix}{norm}.weight"], eps)
            if kind == "attn":
                out = attention(config, weights, prefix, layer, mixed, {})
            else:
                out = mlp(config, weights, prefix, mixed)
            streams = [
                sum((residual[i][j] * streams[j] for j in range(rate)), torch.zeros_like(x)) + post[i] * out
                for i in range(rate)
            ]
    return head(config, weights, sum(streams, torch.zeros_like(x)))


def gated_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Gated residual (arXiv 2608.30320), one stream at a time."""
    rate, size = config.gated_residual.rate, config.hidden_size

    def read(own: str, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        normed = [rms_norm(streams[i], weights[own + "norm.weight"][i], config.rms_norm_eps) for i in range(rate)]
        vector = torch.cat(normed, -1)
        low = vector @ weights[own + "compress_proj.weight"].T / rate
        opened = (low / (1 + torch.exp(-low))) @ weights[own + "expand_proj.weight"].T
        total = torch.zeros_like(x)
        for i in range(rate):
            total = total + normed[i] / (1 + torch.exp(-opened[..., i * size : (i + 1) * size]))
        return total / rate, vector

    streams = [x] * rate
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for kind in ("attn", "mlp"):
            own = f"{prefix}{kind}_connection."
            mixed, vector = read(own, streams)
            out = (
                attention(config, weights, prefix, layer, mixed, {})
                if kind == "attn"
                else mlp(config, weights, prefix, mixed)
            )
            for i in range(rate):
                gate = 2 / (1 + torch.exp(-(vector @ weights[own + "write_proj.weight"][i]) / rate))
                streams = [*streams[:i], streams[i] + gate.unsqueeze(-1) * out, *streams[i + 1 :]]
    x, _ = read("model.norm.", streams)
    return vocabulary(config, weights, x)


def sinkhorn(z: list[Tensor], rate: int) -> list[list[Tensor]]:
    """exp of n × n numbers; 20 times, rows are divided by their sums, then columns."""
    rows = [[z[i * rate + j].exp() for j in range(rate)] for i in range(rate)]
    for _ in range(20):
        rows = [[value / torch.stack(row).sum(0) for value in row] for row in rows]
        totals = [torch.stack([row[j] for row in rows]).sum(0) for j in range(rate)]
        rows = [[row[j] / totals[j] for j in range(rate)] for row in rows]
    return rows


def permuted(z: list[Tensor], rate: int) -> list[list[Tensor]]:
    """Each permutation's share of the softmax goes to the places of its ones."""
    shares = torch.cat(z, -1).softmax(-1)
    rows = [[torch.zeros_like(z[0]) for _ in range(rate)] for _ in range(rate)]
    for index, permutation in enumerate(permutations(range(rate))):
        for i, j in enumerate(permutation):
            rows[i][j] = rows[i][j] + shares[..., index, None]
    return rows


def attention_residuals_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Attention Residuals (arXiv 2603.15031): sub-layer by sub-layer, source by source."""
    blocks, outputs = [x], []  # finished blocks, and the outputs of the sub-layers of the block that is not finished
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for kind in ("attn", "mlp"):
            mixed = depth_attention(config, weights, f"{prefix}{kind}_residual.", blocks, outputs)
            if kind == "attn":
                normed = rms_norm(mixed, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
                outputs.append(attention(config, weights, prefix, layer, normed, {}))
            else:
                normed = rms_norm(mixed, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
                outputs.append(mlp(config, weights, prefix, normed))
            if len(outputs) == config.attention_residuals.block_size:
                blocks, outputs = [*blocks, sum(outputs, torch.zeros_like(x))], []
    return head(config, weights, depth_attention(config, weights, f"{prefix}output_residual.", blocks, outputs))


def depth_attention(
    config: ModelConfig, weights: Weights, own: str, blocks: list[Tensor], outputs: list[Tensor]
) -> Tensor:
    """Σ_i a_i·v_i with a = softmax_i(wᵀ·RMSNorm(v_i)) over finished blocks and the sum of the outputs since."""
    sources = [*blocks, sum(outputs, torch.zeros_like(blocks[0]))] if outputs else blocks
    if len(sources) == 1:
        return sources[0]
    scores = []
    for source in sources:
        key = rms_norm(source, weights[own + "key_layernorm.weight"], config.rms_norm_eps)
        scores.append((key * weights[own + "query"]).sum(-1).exp())
    mixed = [score.unsqueeze(-1) * source for score, source in zip(scores, sources, strict=True)]
    return sum(mixed, torch.zeros_like(blocks[0])) / sum(scores).unsqueeze(-1)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def mlp(config: ModelConfig, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    gate = x @ weights[prefix + "mlp.gate_proj.weight"].T
    up = x @ weights[prefix + "mlp.up_proj.weight"].T
    return branch_scale(config) * ((gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T)


def branch_scale(config: ModelConfig) -> float:
    """The factor of a sub-layer's output."""
    base = config.numerics.base_num_hidden_layers or config.num_hidden_layers
    return config.numerics.residual_scale / (config.num_hidden_layers / base) ** 0.5


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    return vocabulary(config, weights, rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps))


def vocabulary(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Logits of the normed state."""
    logits = x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    if config.tie_word_embeddings and config.numerics.base_hidden_size:
        logits = logits / (config.hidden_size / config.numerics.base_hidden_size)
    cap = config.numerics.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def attention(
    config: ModelConfig, weights: Weights, prefix: str, layer: int, x: Tensor, slots: dict[Entry, tuple[Tensor, Tensor]]
) -> Tensor:
    """One attention sub-layer; adds this layer's (k, v), [B, T, G, d] each, to ``slots``, and summaries that come before."""
    batch, length, _ = x.shape
    heads, groups, size = config.num_attention_heads, config.key_value_heads, config.head_size
    q = (x @ weights[prefix + "self_attn.q_proj.weight"].T).view(batch, length, heads, size)
    k = (x @ weights[prefix + "self_attn.k_proj.weight"].T).view(batch, length, groups, size)
    v = (x @ weights[prefix + "self_attn.v_proj.weight"].T).view(batch, length, groups, size)
    for m, entry in summaries_after(config, layer - 1):
        rows = weights[f"model.history.chunks.{m}.weight"][entry.row * groups : (entry.row + 1) * groups]
        key, value = (mix(rows, [slots[Entry(one)][part] for one in entry.layers]) for part in (0, 1))
        slots[entry] = key, value
    slots[Entry(layer)] = k, v
    if config.architecture == "lime" and layer > 0:
        names = [prefix + f"self_attn.router.{kind}weight" for kind in ("first_", "summary_", "")]
        router = torch.cat([weights[name] for name in names if name in weights], 1)
        read = make_policy(config.lime).reads(layer)
        k, v = (mix(router, [slots[entry][part] for entry in read]) for part in (0, 1))
    if config.architecture == "value_residual" and layer > 0:
        share = config.value_residual.weight
        first, own = weights.get(prefix + "self_attn.router.weight", (share, 1 - share))
        v = first * slots[Entry(0)][1] + own * v
    out = causal(config, weights, prefix, q, k, v) @ weights[prefix + "self_attn.o_proj.weight"].T
    return branch_scale(config) * out


def summaries_after(config: ModelConfig, layer: int) -> list[tuple[int, Entry]]:
    """Return (m, row of U_m) for the chunk whose last layer is ``layer``, if a later layer reads them."""
    if config.architecture != "lime":
        return []
    policy = make_policy(config.lime)
    read = {entry for reader in range(config.num_hidden_layers) for entry in policy.reads(reader)}
    return [(layer // entry.span, entry) for entry in sorted(read) if entry.is_summary and entry.layer == layer]


def causal(config: ModelConfig, weights: Weights, prefix: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, T, H, d] over [B, T, G, d], position by position; returns [B, T, H·d]."""
    q = head_norm(config, weights, prefix + "self_attn.q_norm.weight", q)
    k = head_norm(config, weights, prefix + "self_attn.k_norm.weight", k)
    heads, groups, size, length = q.shape[2], k.shape[2], q.shape[3], q.shape[1]
    q, k = rotate(q, config), rotate(k, config)
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        rows = []
        for position in range(length):
            scores = torch.einsum("bd,btd->bt", q[:, position, head], k[:, : position + 1, group]) / size**0.5
            rows.append(torch.einsum("bt,btd->bd", scores.softmax(-1), v[:, : position + 1, group]))
        outputs.append(torch.stack(rows, 1))
    return torch.cat(outputs, -1)


def mix(router: Tensor, slots: list[Tensor]) -> Tensor:
    """Σ_ℓ' Σ_g' R[g, ℓ'G+g']·S_ℓ',g' for every g; slots are [B, T, G, d]."""
    groups = router.shape[0]
    mixed = []
    for g in range(groups):
        total = torch.zeros_like(slots[0][:, :, 0])
        for index, slot in enumerate(slots):
            for other in range(groups):
                total = total + router[g, index * groups + other] * slot[:, :, other]
        mixed.append(total)
    return torch.stack(mixed, 2)


def frequency(config: ModelConfig, pair: int) -> float:
    """θ^(−2i/d), scaled as in the code that Meta published with Llama 3.1."""
    frequency, scaling = config.rope_theta ** (-2 * pair / config.head_size), config.rope_scaling
    if scaling.rope_type == "default":
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    wavelength, length = 2 * math.pi / frequency, scaling.original_max_position_embeddings
    if wavelength < length / scaling.high_freq_factor:
        return frequency
    if wavelength > length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(x_BTHd: Tensor, config: ModelConfig) -> Tensor:
    """Rotary embedding: pairs (i, i + d/2) turned by position · frequency."""
    length, size = x_BTHd.shape[1], x_BTHd.shape[-1]
    out = torch.empty_like(x_BTHd)
    for i in range(size // 2):
        angle = torch.arange(length, dtype=x_BTHd.dtype) * frequency(config, i)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        first, second = x_BTHd[..., i], x_BTHd[..., i + size // 2]
        out[..., i] = first * cos - second * sin
        out[..., i + size // 2] = second * cos + first * sin
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
