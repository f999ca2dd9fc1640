"""Every parameter of a decoder by formula: its exported name and its number of elements."""

from __future__ import annotations

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import CHUNKS, Sizes, architecture_of, chunk_ends
from lime_dist.model.transformer import EMBEDDING_WEIGHT, HEAD_WEIGHT

FINAL_NORM = "model.norm"
"""Prefix of the exported names of the final norm's parameters."""


def stage_parameters(config: ModelConfig, layers: range) -> Sizes:
    """Parameters of a stage that holds ``layers``, by exported name.

    The embedding is with the first layer, norm and output projection with the last.
    """
    sizes: Sizes = {}
    if layers.start == 0:
        sizes[EMBEDDING_WEIGHT] = config.vocab_size * config.hidden_size
    for layer in layers:
        sizes |= layer_parameters(config, layer)
    if layers.stop == config.num_hidden_layers:
        sizes |= final_norm_parameters(config)
        head = EMBEDDING_WEIGHT if config.tie_word_embeddings else HEAD_WEIGHT
        sizes[head] = config.vocab_size * config.hidden_size
    return sizes


def final_norm_parameters(config: ModelConfig) -> Sizes:
    """Parameters of the final norm, by exported name."""
    return {f"{FINAL_NORM}.{name}": size for name, size in architecture_of(config).final_norm_parameters().items()}


def layer_parameters(config: ModelConfig, layer: int) -> Sizes:
    """Parameters of a decoder layer and of the chunk summary that it ends, by exported name."""
    architecture = architecture_of(config)
    sizes = {f"model.layers.{layer}.{name}": size for name, size in architecture.layer_parameters(layer).items()}
    if (chunk := chunk_ends(config).get(layer)) is not None:
        sizes[f"{CHUNKS}{chunk.index}.weight"] = architecture.summary_parameters(chunk)
    return sizes
