"""The least memory traffic of a history of keys and values: what kernels would move that read every factor once and keep all
sums of a layer, of a block's shared reads and of a summary in registers.

It bounds what a kernel of our own could save: compare it with the kernels that run (`roofline.py`).
"""

from __future__ import annotations

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of, stage_layout
from lime_dist.model.chunks import Chunk
from lime_dist.model.layout import StageLayout


def fused_history_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int | None:
    """Bytes of one forward and backward pass of all layers; None for a model without such a history."""
    layout = stage_layout(config, range(config.num_hidden_layers))
    architecture = architecture_of(config)
    if layout is None or not architecture.receives_in_place:
        return None
    entries = sum(layer_entries(layout, layer) for layer in layout.reads)
    entries += sum(summary_entries(layout, chunk) for chunk in layout.chunks)
    return entries * architecture.entry_width * num_tokens * itemsize


def layer_entries(layout: StageLayout, layer: int) -> int:
    """Entries that a layer reads or writes; what its block shares counts for the block's first layer."""
    block, alone, readers = layout.blocks[layer], len(layout.read_alone[layer]), len(layout.readers_alone[layer])
    # Forward: keys and values in, slot out, entries in except the layer's own slot, mixture out.
    # Backward: gradient in, to its place, entries in; gradients of other readers in, that of the slot out.
    moved = 1 + 1 + (alone - 1) + 1 + (1 + 1 + alone) + (readers - 1) + 1
    moved += (1 if block.older.runs else 0) + (
        1 if block.readers.runs else 0
    )  # the layer's part of what the block shares
    if layer == block.layers[0]:
        if block.older.runs:  # mixtures; gradients of weights
            moved += len(block.older) + len(block.layers) + len(block.older) + len(block.layers)
        if block.readers.runs:  # gradients of slots
            moved += len(block.readers) + len(block.layers)
    return moved


def summary_entries(layout: StageLayout, chunk: Chunk) -> int:
    """Entries that a summary reads or writes; what a block of summaries shares counts for its oldest one."""
    block = layout.summary_blocks[chunk.index]
    # The summary; the gradient of its weights; its own gradient.
    moved = (
        (len(chunk.layers) + chunk.num_rows) * 2
        + len(layout.other_readers(chunk.rows[0], block.readers))
        + chunk.num_rows
    )
    if block.readers.runs:
        moved += chunk.num_rows
        if chunk.layers.start == block.layers.start:
            moved += len(block.readers) + len(block.own)
    return moved
