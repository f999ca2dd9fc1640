"""What a model costs, by formula: parameters, FLOPs of matrix products, entries and bytes of the layer history, activations.

FLOPs (2 a multiply-add) are those that this program performs, per token, elementwise work left out. Causal attention counts the pairs that the mask leaves, (T + 1)/2 a token; its backward pass makes the scores again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from lime_dist.config.schema import ModelConfig
from lime_dist.model import parameters
from lime_dist.model.parameters import chunk_ends, entries_weighed
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
    return sum(parameters.stage_parameters(config, range(config.num_hidden_layers)).values())


def layer_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of decoder layer ``layer``."""
    return sum(parameters.layer_parameters(config, layer).values())


def summary_parameters(config: ModelConfig, layers: range | None = None) -> int:
    """Parameters of the chunk summaries of a stage that holds ``layers`` (by default all)."""
    layers = range(config.num_hidden_layers) if layers is None else layers
    return sum(sum(parameters.summary_parameters(config, layer).values()) for layer in layers)


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
    if config.architecture != "lime":
        return [fixed] * len(layers)
    routing = _hidden_flops if config.lime.routes == "hidden" else _key_value_flops
    return [fixed + found for found in routing(config, layers)]


def _key_value_flops(config: ModelConfig, layers: range) -> list[Flops]:
    """Mixing keys and values, each entry once a reader; backward: the weights' gradients, and those of the entries."""
    heads, policy = config.key_value_heads, make_policy(config.lime)
    unit = 2 * heads * heads * 2 * config.head_size
    reads = [tuple(policy.reads(layer)) for layer in layers]
    chunks = {end: chunk for end, chunk in chunk_ends(config).items() if end in layers}
    readers: Counter[Entry] = Counter(entry for entries in reads for entry in entries)
    for chunk in chunks.values():
        for entry in chunk.sources:
            readers[entry] += chunk.num_rows
    received = sum(count for entry, count in readers.items() if entry.layer < layers.start)
    found = []
    for layer, entries in zip(layers, reads, strict=True):
        forward = len(entries)
        backward = forward + readers[Entry(layer)] + (received if layer == layers.start else 0)
        if layer in chunks:
            weights = chunks[layer].num_rows * len(chunks[layer].layers)
            forward += weights
            backward += weights + sum(readers[row] for row in chunks[layer].rows)
        found.append(Flops(unit * forward, unit * backward))
    return found


def _hidden_flops(config: ModelConfig, layers: range) -> list[Flops]:
    """Mixing states per head; backward: the gradients of weights and of entries, and the mixtures again. Dynamic weights
    come from logits, which are products as well."""
    unit = 2 * config.num_attention_heads * config.hidden_size
    forward, backward = (2, 2 + 3) if config.lime.router == "dynamic" else (1, 3)
    counts = [len(entries_weighed(config, layer)) for layer in layers]
    return [Flops(forward * unit * read, backward * unit * read) for read in counts]


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
    return sum(_live_counts(config)[boundary])


@lru_cache(maxsize=8)
def _live_counts(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """By boundary 0 … L: slots and rows of summaries that cross it (those of `live_entries`, for all boundaries at once)."""
    found = [[0, 0] for _ in range(config.num_hidden_layers + 1)]
    last_use: dict[Entry, int] = {}
    if config.architecture == "lime":
        policy = make_policy(config.lime)
        for layer in range(config.num_hidden_layers):
            last_use.update(dict.fromkeys(policy.reads(layer), layer))
        for end, chunk in chunk_ends(config).items():
            for entry in chunk.sources:
                last_use[entry] = max(last_use[entry], end)
    for entry, last in last_use.items():
        for boundary in range(entry.layer + 1, last + 1):
            found[boundary][entry.is_summary] += 1
    return tuple((slots, rows) for slots, rows in found)


def entries_made(config: ModelConfig, layer: int) -> int:
    """Entries that a stage makes because it holds ``layer``: its slot, and the summary of a chunk that ends with it."""
    if config.architecture != "lime":
        return 0
    chunk = chunk_ends(config).get(layer)
    return 1 + (0 if chunk is None else chunk.num_rows)


def payload_bytes(config: ModelConfig, boundary: int, num_tokens: int, itemsize: int) -> int:
    """Bytes of one micro-batch's payload over that boundary; its gradient has as many."""
    streams = config.hyper.rate if config.architecture == "hyper" else 1
    width = streams * config.hidden_size + boundary_entries(config, boundary) * entry_width(config)
    return width * num_tokens * itemsize


def history_bytes(config: ModelConfig, layers: range, num_tokens: int, itemsize: int) -> int:
    """Bytes of one micro-batch's entries on a stage that holds ``layers``, and, with ``routes: hidden``, of their gradients
    while backward runs (``routes: kv`` keeps those in the same memory)."""
    positions = boundary_entries(config, layers.start) + sum(entries_made(config, layer) for layer in layers)
    elements = positions * entry_width(config) * num_tokens
    hidden_routes = config.architecture == "lime" and config.lime.routes == "hidden"
    return elements * (itemsize + (max(itemsize, 4) if hidden_routes else 0))


# -- activations ----------------------------------------------------------------------------------------------------------


def activation_bytes(config: ModelConfig, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a decoder layer of one micro-batch from its forward to its backward pass: the layer's
    input and what is made from it. The history's own memory (`history_bytes`), parameters and rotary tables are not in it.

    Exact, on the CPU and not compiled (tests/model/test_cost.py counts), but for bf16 stages that summarise a chunk which
    began on another stage (``routes: hidden``): up to 3 % too much.

    Args:
        itemsize: of the precision of the run; norms and softmax statistics are never kept below float32.
        checkpointing: only the input is kept, and what ``routes: hidden`` makes outside the layer.
    """
    hidden, heads, exact = config.hidden_size, config.num_attention_heads, max(itemsize, 4)
    lime, read = config.lime, len(entries_weighed(config, layer))
    hidden_routes = config.architecture == "lime" and lime.routes == "hidden"
    streams = config.hyper.rate if config.architecture == "hyper" and layer > 0 else 1  # they start as one embedding
    low, high, fixed = [streams * hidden], [0], [0]  # elements: per token, per token in at least float32, of no token
    if not checkpointing:
        low = [
            4 * hidden,  # attention: queries, keys and values per query head, output
            4 * config.intermediate_size,  # SwiGLU: gate, silu(gate), up, their product
        ]
        high = [heads]  # attention: log of the sum of exponentials
        if config.architecture == "hyper":
            low += [_connection_elements(config, streams), _connection_elements(config, config.hyper.rate)]
            fixed += [2 * hidden * (config.hyper.rate + 2) if config.hyper.dynamic else 0]  # alpha beside beta, twice
        else:
            low += [2 * 2 * hidden]  # both norms: output before and after the weight
            high += [2 * (hidden + 1)]  # both norms: input, root mean square
        if config.architecture == "lime" and heads == config.key_value_heads and (read or not hidden_routes):
            low += [hidden]  # mixed keys, in one piece of memory with the values
        if hidden_routes and read:
            fixed += [2 * 2 * hidden * hidden]  # projections of keys and values, without and with the norm's weight
            if lime.router == "dynamic":
                low += [hidden, heads * read]  # input under the history norm, weights
    if hidden_routes and lime.router == "static" and read:
        pruned = lime.top_p is not None and lime.top_p != 1
        fixed += [heads * (3 * read + 1 if pruned else read)]  # weights; pruned: and their mask, result, sums
    kept = num_tokens * (itemsize * sum(low) + exact * sum(high)) + itemsize * sum(fixed)
    if hidden_routes and layer in chunk_ends(config):
        chunk = chunk_ends(config)[layer]
        kept += (
            exact * chunk.num_rows * (num_tokens * (hidden + 1) + len(chunk.layers))
        )  # before its norm, rms, weights
        if exact != itemsize and not checkpointing:
            kept += itemsize * num_tokens * hidden * len(chunk.layers)  # states, of which layers kept float32 copies
    return kept


def _connection_elements(config: ModelConfig, streams: int) -> int:
    """Per token, what one Hyper-Connection keeps; ``streams`` of its input are memory of their own."""
    rate, hidden = config.hyper.rate, config.hidden_size
    kept = (streams + rate + 1) * hidden  # input, mixtures
    kept += 2 * hidden + 2  # input and output of the sub-layer, mean and deviation (on a GPU in float32)
    if config.hyper.dynamic:
        kept += rate * (hidden + 2)  # normed streams, mean and deviation
        kept += rate * (rate + 2) + rate * (rate + 1) + rate  # tanh, alpha, beta
    return kept


def received_activation_bytes(
    config: ModelConfig, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool
) -> int:
    """Bytes that a stage keeps of the payload received over a boundary, beside its layers' and its history's.

    With ``routes: kv`` the payload landed in the history's own memory; with ``routes: hidden`` its entries are apart.
    """
    hidden, exact, kept = config.hidden_size, max(itemsize, 4), 0
    if not checkpointing and config.architecture == "hyper":
        kept += 0 if config.hyper.dynamic else itemsize * config.hyper.rate * hidden  # the first layer transposes them
    elif not checkpointing and exact != itemsize:
        kept += itemsize * hidden  # hidden state, of which the first layer keeps a float32 copy
    if config.architecture == "lime" and config.lime.routes == "hidden":
        slots, summaries = _live_counts(config)[boundary]
        kept += itemsize * (slots + summaries) * hidden + exact * slots  # entries; roots of the states' mean squares
        kept += 0 if exact == itemsize else exact * slots * hidden  # float32 copies of the states
    return num_tokens * kept


def embedding_activation_bytes(num_tokens: int) -> int:
    """Bytes that the embedding keeps on the first stage: token numbers."""
    return 8 * num_tokens


def head_activation_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Bytes that norm, output projection and loss keep on the last stage."""
    hidden, exact = config.hidden_size, max(itemsize, 4)
    norm = exact * (hidden + 1) + 2 * itemsize * hidden  # input, root mean square; output before and after the weight
    loss = exact * config.vocab_size + 8  # log-probabilities, labels
    return num_tokens * (norm + loss) + exact  # and the number of tokens
