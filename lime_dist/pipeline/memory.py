"""Memory of a stage at the peak of a training step, by formula.

It consists of parameters and optimizer, micro-batches in flight, payloads in transfer, and temporary tensors of a backward pass.
The peak is in one of the backward passes: forward passes hold no more micro-batches and need less. Bytes are those of live
tensors; the allocator's reserve, libraries and the process itself come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lime_dist.config.precision import ITEM_BYTES, accumulation_itemsize
from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Checkpointing, Config
from lime_dist.model import cost
from lime_dist.model.architecture import Sizes, architecture_of
from lime_dist.model.crossing import Cut
from lime_dist.pipeline.optimizer_memory import layout_of_stage, optimizer_bytes
from lime_dist.pipeline.schedules.base import BoundaryBytes, Integers, Schedule
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.pipeline.wire_format import WireFormat

HISTORIES_ON_DEVICE = 3
"""Most histories that are on the device during a backward pass with ``parallel.offload_history`` (`waiting_histories`)."""


@dataclass(frozen=True)
class MicroBatchBytes:
    """What stages keep of one micro-batch from its forward to its backward pass.

    Attributes:
        checkpointing: by decoder layer, what is computed again in backward.
        layers: by decoder layer, activations that autograd keeps.
        weight_passes: by decoder layer, what a weight pass that is held back keeps; 0 if the schedule has none.
        received: by boundary 0 … L, what a stage that begins there keeps of the payload received, and of documents.
        made: by decoder layer, history entries that its stage adds because of it.
        crossing: by boundary, history entries and partial mixtures that cross it.
        payload: by boundary, hidden state and what crosses of the history, in the type of the run.
        sent: by boundary, the same in the form in which they are sent.
        state_in_history: by boundary, the hidden state of a received payload, if it is in the memory of the stage's history.
        embedding, head: kept by the first and by the last stage.
        lands: whether a payload is received into the memory of its history, and not decoded into it.
    """

    checkpointing: list[Checkpointing]
    layers: list[int]
    weight_passes: list[int]
    received: list[int]
    made: list[int]
    crossing: list[int]
    payload: list[int]
    sent: list[int]
    state_in_history: list[int]
    embedding: int
    head: int
    lands: bool

    @classmethod
    def of(
        cls, config: Config, bounds: Sequence[int] | None = None, checkpointing: Checkpointing | None = None
    ) -> MicroBatchBytes:
        """
        Args:
            bounds: see `boundary_prices`; with stages of several parts, only what crosses these cuts counts then.
            checkpointing: of all stages; None: the configuration's, which must be the same for all stages if there are no bounds.
        """
        model = config.model
        again = checkpointing_by_layer(config, bounds, checkpointing)
        layers, inner = range(model.num_hidden_layers), range(1, model.num_hidden_layers)
        size, wires = (
            ITEM_BYTES[config.precision],
            [WireFormat.of(config, boundary, boundary_prices(config, bounds)) for boundary in inner],
        )
        tokens = config.train.micro_batch_size * config.data.sequence_length
        entry, prices = architecture_of(model).entry_width * tokens * size, boundary_prices(config, bounds)
        splits = SCHEDULES[config.pipeline.schedule].splits_backward
        payload = [cost.payload_bytes(model, boundary, tokens, size, prices) for boundary in inner]
        received = [
            cost.received_activation_bytes(model, boundary, tokens, size, again[boundary]) for boundary in inner
        ]
        crossing = [cost.boundary_entries(model, boundary, prices) * entry for boundary in inner]
        states = [whole - entries for whole, entries in zip(payload, crossing, strict=True)]
        in_place = architecture_of(model).receives_in_place
        length = config.data.sequence_length
        documents = cost.document_bytes(model, tokens, length, size) if config.data.document_mask else 0
        return cls(
            checkpointing=again,
            layers=[cost.activation_bytes(model, layer, tokens, size, again[layer]) for layer in layers],
            weight_passes=[splits * cost.weight_pass_bytes(model, layer, tokens, size) for layer in layers],
            received=[documents, *(each + documents for each in received), 0],
            made=[cost.entries_made(model, layer) * entry for layer in layers],
            crossing=[0, *crossing, 0],
            payload=[0, *payload, 0],
            sent=[0, *(wire.nbytes(tokens) for wire in wires), 0],
            state_in_history=[0, *(in_place * state for state in states), 0],
            embedding=cost.embedding_activation_bytes(tokens),
            head=cost.head_activation_bytes(model, tokens, size),
            lands=in_place and config.pipeline.wire_dtype in (None, config.precision),
        )

    def activations(self, layers: range) -> int:
        """Activations that autograd keeps on a stage that holds ``layers``."""
        kept = sum(self.layers[layers.start : layers.stop]) + self.received[layers.start]
        kept += self.embedding if layers.start == 0 else 0
        return kept + (self.head if layers.stop == len(self.layers) else 0)

    def history(self, layers: range) -> int:
        """Entries and received partial mixtures of the stage's history."""
        return self.crossing[layers.start] + sum(self.made[layers.start : layers.stop])

    def boundary(self, layers: range) -> BoundaryBytes:
        """What a stage that holds ``layers`` exchanges with its neighbours."""
        received = self.sent[layers.start]
        landing = received + (self.history(layers) - self.crossing[layers.start] if self.lands else 0)
        return BoundaryBytes(received, self.sent[layers.stop], landing if layers.start else 0)


def checkpointing_by_layer(
    config: Config, bounds: Sequence[int] | None, checkpointing: Checkpointing | None = None
) -> list[Checkpointing]:
    """What of each decoder layer is computed again; the arguments are those of `MicroBatchBytes.of`."""
    parallel, layers = config.parallel, config.model.num_hidden_layers
    if checkpointing is None and bounds is not None:
        parts = enumerate(pairwise(bounds))
        stages = [part % parallel.pipeline_stages for part, (start, stop) in parts for _ in range(start, stop)]
        return [parallel.checkpointing_of(stage) for stage in stages]
    return [parallel.checkpointing_of(0) if checkpointing is None else checkpointing] * layers


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage at its peak.

    Attributes:
        weights: in the precision of the run.
        optimizer: accumulated gradients, and masters and optimizer states of the replica that has most.
        activations: of the micro-batches in flight, and what is kept for weight passes that are held back.
        history: entries of the micro-batches in flight, without those that wait in host memory.
        transfers: payloads and their gradients in transfer.
        working: temporary tensors of the backward pass; or a history that leaves while a forward pass runs, if that is more.
        in_flight: number of micro-batches whose activations are held; each counts once for every part that it is in.
        host: pinned memory for histories that wait (``parallel.offload_history``); not a part of the peak, which is the device's.
    """

    weights: int
    optimizer: int
    activations: int
    history: int
    transfers: int
    working: int
    in_flight: int
    host: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.activations + self.history + self.transfers + self.working


def stage_memory(
    config: Config,
    kept: MicroBatchBytes,
    sizes: Sizes,
    bounds: Sequence[int],
    stage: int,
    schedule: Schedule,
    replicas: int,
) -> StageMemory:
    """Memory of a stage at its peak.

    Args:
        sizes: of the stage's parameters.
        bounds: the result of `partition.stage_bounds`.
        schedule: of the step.
        replicas: number of replicas.
    """
    weights, optimizer = optimizer_bytes(config, layout_of_stage(config, sizes, bounds, replicas))
    if schedule.parts > 1:
        parts = Cut(tuple(bounds), schedule.stages).of_stage(stage)
        return _memory_of_parts(config, kept, weights, optimizer, parts, stage, schedule)
    layers = range(bounds[stage], bounds[stage + 1])
    activations, history = kept.activations(layers), kept.history(layers)
    held, held_back, transfers = schedule.memory_in_flight(stage, kept.boundary(layers))
    weight_pass = sum(kept.weight_passes[layers.start : layers.stop])
    here, state = histories_on_device(config, held), kept.state_in_history[layers.start]
    waiting, working, host = held - here, working_bytes(config, kept, layers), 0
    if waiting.any():
        working = max(
            working, history + state
        )  # while a forward pass runs, the history before its own is still leaving
        host = host_buffers(int(held.max()), len(held)) * pinned(history + state)
    worst = int((held * activations + here * history - waiting * state + held_back * weight_pass + transfers).argmax())
    return StageMemory(
        weights=weights,
        optimizer=optimizer,
        activations=int(held[worst] * activations - waiting[worst] * state + held_back[worst] * weight_pass),
        history=int(here[worst]) * history,
        transfers=int(transfers[worst]),
        working=working,
        in_flight=int(held[worst]),
        host=host,
    )


def offloads_history(config: Config) -> bool:
    """Whether histories that wait are moved to host memory."""
    return config.parallel.offload_history and architecture_of(config.model).can_offload_history


def histories_on_device(config: Config, held: Integers) -> Integers:
    """The number of histories on the device in a backward pass, of ``held`` micro-batches in flight."""
    return np.minimum(held, HISTORIES_ON_DEVICE) if offloads_history(config) else held


def host_buffers(in_flight: int, micro_batches: int) -> int:
    """The number of histories for which a stage needs host memory: all in flight, without that of the next backward pass. The first two
    of a step never leave the device."""
    return min(in_flight - 1, micro_batches - 2)


def pinned(nbytes: int) -> int:
    """Bytes that torch allocates for ``nbytes`` of pinned memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length()


def _memory_of_parts(
    config: Config,
    kept: MicroBatchBytes,
    weights: int,
    optimizer: int,
    parts: Sequence[range],
    stage: int,
    schedule: Schedule,
) -> StageMemory:
    """Memory of a stage with several parts. The history of a micro-batch, which they share, is held from its first forward pass on the
    stage to its last backward pass; gradients of entries, if they have a buffer, from the first backward pass on."""
    size = ITEM_BYTES[config.precision]
    history = sum(map(kept.history, parts))
    gradients = history * architecture_of(config.model).history_gradient_itemsize(size) // size
    held = schedule.held_by_part(stage)
    transfers = schedule.transfers_of_parts(stage, [kept.boundary(layers) for layers in parts])
    activations = np.array([kept.activations(layers) for layers in parts]) @ held
    working = np.array([working_bytes(config, kept, layers) for layers in parts])[schedule.part_in_backward(stage)]
    histories = history * held[0] + gradients * (held[0] - held[-1])
    worst = int((activations + histories + transfers + working).argmax())
    return StageMemory(
        weights=weights,
        optimizer=optimizer,
        activations=int(activations[worst]),
        history=int(histories[worst]),
        transfers=int(transfers[worst]),
        working=int(working[worst]),
        in_flight=int(held[:, worst].sum()),
    )


def working_bytes(config: Config, kept: MicroBatchBytes, layers: range) -> int:
    """Temporary tensors of a backward pass: the most that one of its moments needs, less what has been freed until then.

    It counts large tensors only. tests/test_plan_of_engines.py holds the stage's peak to 5 %.
    """
    model, checkpointing = config.model, kept.checkpointing[layers.start] is True
    size, tokens = ITEM_BYTES[config.precision], config.train.micro_batch_size * config.data.sequence_length
    accumulation_bytes = accumulation_itemsize(size)
    stream = tokens * model.hidden_size * size
    feed_forward = tokens * model.intermediate_size * size
    embedding = model.vocab_size * model.hidden_size * size
    last = layers.stop == model.num_hidden_layers
    everything = kept.activations(layers) - sum(kept.weight_passes[layers.start : layers.stop])
    freed = kept.head if last else 0

    shape = architecture_of(model).hidden_shape
    streams = tokens * math.prod(shape) * size if len(shape) > 1 else 0  # gradients of mixed residual streams
    comes_back = 0 if last or not architecture_of(model).sums_sent_gradients else _gradient_bytes(config, kept, layers)
    splits_backward = any(kept.weight_passes)
    # Gradients of SwiGLU's parts, and what is gone after it. A weight pass keeps the product, and what it makes gradients from.
    in_swiglu, swiglu = 2 * feed_forward, 4 * feed_forward + 2 * stream
    if splits_backward:
        in_swiglu, swiglu = 3 * feed_forward, feed_forward
    peaks = []
    for block in reversed(architecture_of(model).backward_blocks(layers)):
        top = block.stop - 1
        again = cost.activation_bytes(model, top, tokens, size, False) - kept.layers[top]  # 0 if all is kept
        history = _history_bytes(config, kept, layers, block)
        before = architecture_of(model).feed_forward_history_bytes(layers, top, tokens, size, checkpointing)
        peaks += [
            # SwiGLU of the block's last layer; its attention.
            again + comes_back + before + in_swiglu + streams + (stream if last else 0) - freed,
            again + history + 6 * stream - swiglu - freed,
        ]
        # Its read: three states, four gradients.
        if read := architecture_of(model).read_gradient_bytes(layers, block, tokens, size, checkpointing):
            left = kept.weight_passes[top] - (0 if checkpointing else kept.layers[top])
            peaks.append(history + read + 7 * stream + left - freed)
        if checkpointing and len(block) > 1:
            peaks.append(again + history + in_swiglu + streams - freed)  # SwiGLU of the layer before
        if kept.checkpointing[top] and splits_backward:
            # SwiGLU of the block's first layer, when weight passes keep much of the others.
            newer = slice(block.start + 1, block.stop)
            left = sum(kept.weight_passes[newer]) - sum(kept.layers[newer])
            peaks.append(again + history + in_swiglu + streams + left - freed)
        freed += sum(kept.layers[block.start : block.stop]) - sum(kept.weight_passes[block.start : block.stop])
    if last:
        logits = cost.loss_piece_tokens(model.vocab_size, tokens) * model.vocab_size
        peaks += [
            2 * logits * accumulation_bytes + stream,  # loss: logits of a piece, log-probabilities; the normed state
            embedding + 2 * stream,  # gradients of the projection and of the normed state, times the factor of the mean
        ]
    if layers.start == 0:
        peaks.append(embedding - everything)
    else:
        peaks.append(_received_gradient_bytes(config, kept, layers) - everything)
    return max(0, *peaks)


def _received_gradient_bytes(config: Config, kept: MicroBatchBytes, layers: range) -> int:
    """What a stage needs for the gradient of its payload, after all layers."""
    model, start = config.model, layers.start
    size, tokens = ITEM_BYTES[config.precision], config.train.micro_batch_size * config.data.sequence_length
    gradient_size = architecture_of(model).history_gradient_itemsize(size)
    if not gradient_size:  # it is computed where it is sent from
        return kept.payload[start]
    if architecture_of(model).sums_sent_gradients:
        return _gradient_bytes(config, kept, layers) + kept.payload[start]
    # The history's gradients, what is still kept, the gradients of entries, and that of the hidden state.
    entries = kept.crossing[start] // (architecture_of(model).entry_width * tokens * size)
    received = architecture_of(model).received_gradient_bytes(entries, tokens, size)
    stream = tokens * model.hidden_size * size
    return _gradient_bytes(config, kept, layers) + kept.received[start] + received + stream


def _history_bytes(config: Config, kept: MicroBatchBytes, layers: range, block: range) -> int:
    """What a history keeps in backward while it goes through a block, beside its entries."""
    size, architecture = ITEM_BYTES[config.precision], architecture_of(config.model)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    gradients = _gradient_bytes(config, kept, layers)
    checkpointing = kept.checkpointing[layers.start] is True
    prices = boundary_prices(config)
    return gradients + architecture.block_gradient_bytes(layers, block, tokens, size, checkpointing, prices)


def _gradient_bytes(config: Config, kept: MicroBatchBytes, layers: range) -> int:
    """The gradients of a stage's entries, where they have a buffer of their own."""
    size = ITEM_BYTES[config.precision]
    return kept.history(layers) * architecture_of(config.model).history_gradient_itemsize(size) // size
