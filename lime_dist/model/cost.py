"""What a model costs, by formula: parameters, FLOPs of matrix products, entries and bytes of the layer history, activations.

FLOPs (2 per multiply-add) are those that this program performs, per token; elementwise work is left out. What depends on the
architecture comes from its object (`architecture.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.config.schema import Checkpointing, ModelConfig
from lime_dist.model.architecture import Flops, architecture_of, chunk_ends, model_crossings
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.parameters import stage_parameters

# -- parameters -----------------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; a tied weight counts once."""
    return sum(stage_parameters(config, range(config.num_hidden_layers)).values())


# -- FLOPs ----------------------------------------------------------------------------------------------------------------


def layer_flops(
    config: ModelConfig, sequence_length: float, layers: range | None = None, prices: Prices = ENTRIES
) -> list[Flops]:
    """FLOPs per token by layer of a stage that holds ``layers`` (by default all): projections, SwiGLU, attention, routing.

    Summaries count with the last layer of their chunk. What a stage adds to partial mixtures of later readers counts with the
    layers of the stage (`crossing.pairs_by_layer`).
    """
    layers = range(config.num_hidden_layers) if layers is None else layers
    return architecture_of(config).layer_flops(sequence_length, layers, prices)


def head_flops(config: ModelConfig) -> Flops:
    """FLOPs per token of the final norm and the output projection."""
    forward = 2 * config.hidden_size * config.vocab_size
    return architecture_of(config).final_norm_flops() + Flops(forward, 2 * forward)


# -- entries and bytes ----------------------------------------------------------------------------------------------------


def boundary_entries(config: ModelConfig, boundary: int, prices: Prices = ENTRIES) -> int:
    """Entries and partial mixtures that cross the boundary before decoder layer ``boundary``, beside the hidden state. A partial
    mixture has the size of an entry."""
    return len(model_crossings(config, prices)[boundary])


def entries_made(config: ModelConfig, layer: int) -> int:
    """Entries that a stage makes because it holds ``layer``: its slots, and the summary of a chunk that ends with it."""
    chunk = chunk_ends(config).get(layer)
    return architecture_of(config).slots_kept(layer) + (0 if chunk is None else chunk.num_rows)


class PayloadParts(NamedTuple):
    """Elements per token of the parts of a payload, in the order in which they lie in it."""

    hidden: int
    entries: int
    mixtures: int


def payload_parts(config: ModelConfig, boundary: int, prices: Prices = ENTRIES) -> PayloadParts:
    """What crosses the boundary before decoder layer ``boundary``."""
    architecture, crossing = architecture_of(config), model_crossings(config, prices)[boundary]
    counts = [len(crossing.entries), len(crossing.mixtures)]
    return PayloadParts(math.prod(architecture.hidden_shape), *(count * architecture.entry_width for count in counts))


def payload_shape(
    config: ModelConfig, boundary: int, batch: int, length: int, prices: Prices = ENTRIES
) -> tuple[int, ...]:
    """Shape of one micro-batch's payload over the boundary before decoder layer ``boundary``: [B, T, C] with a history,
    else the shape of the hidden state."""
    architecture = architecture_of(config)
    if architecture.policy is None:
        return batch, length, *architecture.hidden_shape
    return batch, length, sum(payload_parts(config, boundary, prices))


def payload_bytes(config: ModelConfig, boundary: int, num_tokens: int, itemsize: int, prices: Prices = ENTRIES) -> int:
    """Bytes of one micro-batch's payload over that boundary; its gradient has as many."""
    return math.prod(payload_shape(config, boundary, 1, num_tokens, prices)) * itemsize


def history_bytes(config: ModelConfig, layers: range, num_tokens: int, itemsize: int, prices: Prices = ENTRIES) -> int:
    """Bytes of one micro-batch's entries and received partial mixtures on a stage that holds ``layers``, and of the gradients of
    entries in backward where these have a buffer of their own."""
    architecture = architecture_of(config)
    positions = boundary_entries(config, layers.start, prices) + sum(entries_made(config, layer) for layer in layers)
    elements = positions * architecture.entry_width * num_tokens
    return elements * (itemsize + architecture.history_gradient_itemsize(itemsize))


# -- activations ----------------------------------------------------------------------------------------------------------


def activation_bytes(
    config: ModelConfig, layer: int, num_tokens: int, itemsize: int, checkpointing: Checkpointing
) -> int:
    """Bytes that autograd keeps of a decoder layer of one micro-batch from its forward to its backward pass: the layer's
    input and what is made from it. The history's own memory (`history_bytes`), parameters and constant tables do not count.

    The number is exact for the CPU without compilation (tests/model/test_cost.py counts).

    Args:
        itemsize: bytes per element of the run's precision; norms and softmax statistics are never kept below float32.
        checkpointing: true: only the layer's input is kept, and what is made outside of the layer; ``selective``: all but
            `feed_forward_activation_bytes`.
    """
    kept = architecture_of(config).activation_bytes(layer, num_tokens, itemsize, checkpointing is True)
    return kept - (feed_forward_activation_bytes(config, num_tokens, itemsize) if checkpointing == "selective" else 0)


def feed_forward_activation_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Bytes that autograd does not keep of a decoder layer if backward computes its feed-forward half again."""
    return architecture_of(config).feed_forward_activations().nbytes(num_tokens, itemsize)


def weight_pass_bytes(config: ModelConfig, layer: int, num_tokens: int, itemsize: int) -> int:
    """Bytes that the weight pass of one micro-batch keeps of a decoder layer while it is held back."""
    return architecture_of(config).weight_pass_bytes(layer, num_tokens, itemsize)


def received_activation_bytes(
    config: ModelConfig, boundary: int, num_tokens: int, itemsize: int, checkpointing: Checkpointing
) -> int:
    """Bytes that a stage keeps of the payload received over a boundary, beside its layers' activations and its history.

    A payload that lands in the history's own memory counts there.
    """
    return architecture_of(config).received_activation_bytes(boundary, num_tokens, itemsize, checkpointing is True)


def document_bytes(config: ModelConfig, num_tokens: int, sequence_length: int, itemsize: int) -> int:
    """Bytes that a stage keeps of a micro-batch because of ``data.document_mask``: the rotary tables of its positions, and the mask if it
    is a tensor on GPUs too. (The mask of flex attention is small. The tensor that takes its place on a CPU is not counted.)"""
    mask = num_tokens * sequence_length * itemsize if architecture_of(config).needs_tensor_mask else 0
    return 2 * config.head_size * num_tokens * accumulation_itemsize(itemsize) + mask


def embedding_activation_bytes(num_tokens: int) -> int:
    """Bytes that the embedding keeps on the first stage: token ids."""
    return 8 * num_tokens


def head_activation_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Bytes that norm, output projection and loss keep on the last stage."""
    hidden, accumulated = config.hidden_size, accumulation_itemsize(itemsize)
    norm = architecture_of(config).final_norm_activation_bytes(num_tokens, itemsize)
    loss = num_tokens * itemsize * hidden  # gradient of the hidden state
    return norm + loss + accumulated * config.vocab_size * hidden  # gradient of the projection


LOGITS_OF_A_PIECE = 1 << 26
"""Logits that the loss computes at a time: few enough to take little memory, enough to keep a GPU busy, and to make a pass over the
projection's gradient for every piece cheap."""
PIECE_UNIT = 128
"""The tokens of a piece are a multiple of this, for the matrix products."""


def loss_piece_tokens(vocab_size: int, num_tokens: int) -> int:
    """Tokens whose logits exist at the same time."""
    pieces = -(-num_tokens * vocab_size // LOGITS_OF_A_PIECE)
    even = -(-num_tokens // pieces)
    return min(num_tokens, -(-even // PIECE_UNIT) * PIECE_UNIT)
