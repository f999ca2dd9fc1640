"""What a model costs, by formula: parameters, FLOPs of matrix products, entries and bytes of the layer history.

FLOPs (2 a multiply-add) are those that this program performs, per token, elementwise work left out. Causal attention counts the pairs that the mask leaves, (T + 1)/2 a token; its backward pass makes the scores again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config.schema import ModelConfig
from lime_dist.model.decoder import stage_layout
from lime_dist.model.layout import StageLayout, live_entries, summarised_chunks
from lime_dist.model.policies import Entry, make_policy


@dataclass(frozen=True)
class Flops:
    """Per token, of the forward and of the backward pass."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> float:
        return self.forward + self.backward


# -- parameters -----------------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, a tied weight once."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    layers = sum(layer_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return embeddings + layers + summary_parameters(config) + config.hidden_size


def layer_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of decoder layer ``layer``."""
    hidden, size = config.hidden_size, config.head_size
    projections = 2 * hidden * size * (config.num_attention_heads + config.key_value_heads)
    total = projections + 3 * hidden * config.intermediate_size
    if config.architecture == "hyper":
        rate = config.hyper.rate
        dynamic = hidden * (rate + 2) + 2 if config.hyper.dynamic else 0
        return total + 2 * (rate * (rate + 1) + rate + dynamic)
    return total + 2 * hidden + router_parameters(config, layer)


def router_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of a layer's router, with its history norm."""
    lime, heads = config.lime, config.num_attention_heads
    if config.architecture != "lime" or layer < (lime.start_layer if lime.routes == "hidden" else 1):
        return 0
    read = len(make_policy(lime).reads(layer))
    if lime.routes == "kv":
        return config.key_value_heads**2 * read
    return config.hidden_size + heads * read * (config.hidden_size if lime.router == "dynamic" else 1)


def summary_parameters(config: ModelConfig) -> int:
    """Parameters of all chunk summaries."""
    if config.architecture != "lime":
        return 0
    square = config.key_value_heads**2 if config.lime.routes == "kv" else 1
    chunks = summarised_chunks(make_policy(config.lime), config.num_hidden_layers)
    return sum(square * chunk.rank * len(chunk.layers) for chunk in chunks)


# -- FLOPs ----------------------------------------------------------------------------------------------------------------


def layer_flops(config: ModelConfig, sequence_length: int, layers: range | None = None) -> list[Flops]:
    """By layer of a stage that holds ``layers`` (by default all): projections, SwiGLU, attention, routing.

    Summaries count with the last layer of their chunk, gradients of received entries with the stage's first layer.
    """
    layers = range(config.num_hidden_layers) if layers is None else layers
    hidden, size, heads = config.hidden_size, config.head_size, config.num_attention_heads
    products = 2 * hidden * (2 * size * (heads + config.key_value_heads) + 3 * config.intermediate_size)
    attention = 2 * 2 * heads * size * (sequence_length + 1) / 2
    fixed = Flops(products + attention, 2 * products + 2.5 * attention)
    if config.architecture == "hyper":
        rate = config.hyper.rate
        mixing = 2 * 2 * rate * hidden * (rate + 1 + (rate + 2 if config.hyper.dynamic else 0))
        fixed += Flops(mixing, 2 * mixing)
    layout = stage_layout(config, layers.start, layers.stop)
    if layout is None:
        return [fixed] * len(layers)
    routing = _dynamic_flops if config.lime.router == "dynamic" else _blocked_flops
    return [fixed + found for found in routing(config, layout)]


def _blocked_flops(config: ModelConfig, layout: StageLayout) -> list[Flops]:
    """Routing of a stage whose weights are known before its layers run: each reads what its policy says, and nothing else."""
    heads, lime = config.key_value_heads, config.lime
    kv = lime.routes == "kv"
    unit = 2 * heads * heads * 2 * config.head_size if kv else 2 * heads * config.hidden_size
    found = []
    for layer, entries in layout.reads.items():
        if not kv:  # backward: weights, entries, and the mixtures again
            read = len(entries) if layer >= lime.start_layer else 0
            found.append(Flops(unit * read, 3 * unit * read))
            continue
        forward = len(entries)
        backward = forward + len(layout.readers_of(Entry(layer)))
        if layer == layout.start:
            backward += sum(len(layout.readers_of(entry)) for entry in layout.received)
        for chunk in layout.chunks:
            if chunk.layers[-1] == layer:
                forward += chunk.rank * len(chunk.layers)
                backward += chunk.rank * len(chunk.layers)
                backward += sum(len(layout.readers_of(row)) for row in chunk.rows)
        found.append(Flops(unit * forward, unit * backward))
    return found


def _dynamic_flops(config: ModelConfig, layout: StageLayout) -> list[Flops]:
    """Routing of layers that weigh by token: logits and mixture, which backward makes again."""
    unit = 2 * config.num_attention_heads * config.hidden_size
    found = []
    for layer, reads in layout.reads.items():
        read = len(reads) if layer >= config.lime.start_layer else 0
        found.append(Flops(2 * unit * read, (2 + 3) * unit * read))
    return found


def head_flops(config: ModelConfig) -> Flops:
    """The output projection."""
    forward = 2 * config.hidden_size * config.vocab_size
    return Flops(forward, 2 * forward)


# -- entries and bytes ----------------------------------------------------------------------------------------------------


def entry_width(config: ModelConfig) -> int:
    """Elements of one entry of the history, per token."""
    return 2 * config.key_value_heads * config.head_size if config.lime.routes == "kv" else config.hidden_size


def boundary_entries(config: ModelConfig, boundary: int) -> int:
    """Entries of the history that cross the boundary before decoder layer ``boundary``, beside the hidden state."""
    if config.architecture != "lime":
        return 0
    return len(live_entries(make_policy(config.lime), boundary, config.num_hidden_layers))


def payload_bytes(config: ModelConfig, boundary: int, num_tokens: int, itemsize: int) -> int:
    """Bytes of one micro-batch's payload over that boundary; its gradient has as many."""
    streams = config.hyper.rate if config.architecture == "hyper" else 1
    width = streams * config.hidden_size + boundary_entries(config, boundary) * entry_width(config)
    return width * num_tokens * itemsize


def history_bytes(config: ModelConfig, layers: range, num_tokens: int, itemsize: int) -> int:
    """Bytes of one micro-batch's entries on a stage that holds ``layers``, and, with ``routes: hidden``, of their gradients
    while backward runs (``routes: kv`` keeps those in the same memory)."""
    layout = stage_layout(config, layers.start, layers.stop)
    if layout is None:
        return 0
    elements = layout.num_positions * entry_width(config) * num_tokens
    return elements * (itemsize + (max(itemsize, 4) if config.lime.routes == "hidden" else 0))
