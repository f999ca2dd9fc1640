"""Every parameter of a decoder by formula: its exported name and how many elements it has."""

from __future__ import annotations

from functools import lru_cache

from lime_dist.config.schema import ModelConfig
from lime_dist.model.layout import Chunk, summarised_chunks
from lime_dist.model.policies import Entry, make_policy

EMBEDDING = "model.embed_tokens.weight"

Sizes = dict[str, int]
"""By exported name: elements."""


def stage_parameters(config: ModelConfig, layers: range) -> Sizes:
    """Of a stage that holds ``layers``: the embedding is with the first layer, norm and output projection with the last."""
    found: Sizes = {}
    if layers.start == 0:
        found[EMBEDDING] = config.vocab_size * config.hidden_size
    for layer in layers:
        found |= layer_parameters(config, layer) | summary_parameters(config, layer)
    if layers.stop == config.num_hidden_layers:
        found["model.norm.weight"] = config.hidden_size
        head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        found[head] = config.vocab_size * config.hidden_size
    return found


def layer_parameters(config: ModelConfig, layer: int) -> Sizes:
    """Of decoder layer ``layer``."""
    hidden, heads, key_value_heads = config.hidden_size, config.num_attention_heads, config.key_value_heads
    sizes = {
        "self_attn.q_proj.weight": hidden * heads * config.head_size,
        "self_attn.k_proj.weight": hidden * key_value_heads * config.head_size,
        "self_attn.v_proj.weight": hidden * key_value_heads * config.head_size,
        "self_attn.o_proj.weight": hidden * heads * config.head_size,
        **{f"mlp.{name}_proj.weight": hidden * config.intermediate_size for name in ("gate", "up", "down")},
    }
    if config.architecture == "hyper":
        for name in ("attn", "mlp"):
            sizes |= {f"{name}_connection.{leaf}": size for leaf, size in _connection(config).items()}
    else:
        sizes |= {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
        sizes |= _router(config, layer)
    return {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}


def _connection(config: ModelConfig) -> Sizes:
    """Of one Hyper-Connection."""
    rate, hidden = config.hyper.rate, config.hidden_size
    sizes = {"static_alpha": rate * (rate + 1), "static_beta": rate}
    if config.hyper.dynamic:
        sizes |= {"dynamic_alpha": hidden * (rate + 1), "dynamic_beta": hidden, "alpha_scale": 1, "beta_scale": 1}
    return sizes


def _router(config: ModelConfig, layer: int) -> Sizes:
    """Of a layer's router, with its history norm."""
    read = entries_weighed(config, layer)
    if not read:
        return {}
    if config.lime.routes == "hidden":
        width = config.hidden_size if config.lime.router == "dynamic" else 1
        weights = config.num_attention_heads * len(read) * width
        return {"history_layernorm.weight": config.hidden_size, "self_attn.router.weight": weights}
    square = config.key_value_heads**2
    summaries = [index for index, entry in enumerate(read) if entry.is_summary]
    if not summaries:
        return {"self_attn.router.weight": square * len(read)}
    first, last = summaries[0], summaries[-1] + 1
    parts = {"first_weight": first, "summary_weight": last - first, "weight": len(read) - last}
    return {f"self_attn.router.{name}": square * count for name, count in parts.items() if count}


def summary_parameters(config: ModelConfig, layer: int) -> Sizes:
    """Of the summary of the chunk that ends with ``layer``, where one is made."""
    chunk = chunk_ends(config).get(layer)
    if chunk is None:
        return {}
    square = config.key_value_heads**2 if config.lime.routes == "kv" else 1
    return {f"model.history.chunks.{chunk.index}.weight": square * chunk.num_rows * len(chunk.layers)}


def entries_weighed(config: ModelConfig, layer: int) -> tuple[Entry, ...]:
    """The entries that a layer mixes by its router; none: it has no router."""
    if config.architecture != "lime" or layer < (config.lime.start_layer if config.lime.routes == "hidden" else 1):
        return ()
    return tuple(make_policy(config.lime).reads(layer))


@lru_cache(maxsize=8)
def chunk_ends(config: ModelConfig) -> dict[int, Chunk]:
    """The chunks that are summarised, by their last layer."""
    if config.architecture != "lime":
        return {}
    chunks = summarised_chunks(make_policy(config.lime), config.num_hidden_layers)
    return {chunk.layers[-1]: chunk for chunk in chunks}
