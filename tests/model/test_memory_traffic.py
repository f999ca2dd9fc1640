"""Protects the plan's count of a history's memory traffic: what the operations of a real history read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.policies import POLICIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lime_dist.config.schema import LimeConfig, ModelConfig
from lime_dist.model.architecture import architecture_of
from lime_dist.model.architectures.lime.kv.history import KeyValueHistory
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import make_policy

LAYERS, HEADS, TOKENS = 13, 2, 1009
"""A prime number of tokens: only tensors of entries have a multiple of it as their number of elements."""
CUTS = [(0, 13), (0, 1), (1, 2), (0, 5), (5, 9), (6, 7), (2, 12), (9, 13)]

aten = torch.ops.aten
OPERATIONS: dict[Any, Callable[..., list[Any]]] = {
    aten.copy_.default: lambda to, source, *_: [to, source],
    aten.clone.default: lambda source, **_: [source, source],
    aten.zero_.default: lambda to: [to],
    aten.mm.default: lambda weights, matrix: [matrix, weights.new_empty(len(weights), 1).expand(-1, matrix.shape[1])],
    aten.mm.out: lambda weights, matrix, out: [matrix, out],
    aten.addmm_.default: lambda total, weights, matrix: [total, total, matrix],
}
"""What an operation reads and writes."""


class Moved(TorchDispatchMode):
    """Counts the elements of entries that operations read and write."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        tensors = [value for value in (*arguments, *(options or {}).values()) if isinstance(value, Tensor)]
        if any(tensor.numel() and tensor.numel() % TOKENS == 0 for tensor in tensors):
            if function in OPERATIONS:
                moved = OPERATIONS[function](*arguments, **(options or {}))
                self.elements += sum(tensor.numel() for tensor in moved)
            else:
                assert function.is_view or function in (aten.new_empty.default, aten.detach.default), function
        return function(*arguments, **(options or {}))


def moved_in_forward(layout: StageLayout) -> float:
    """Entries that a history reads and writes between its ``open`` and the end of its ``pack``."""
    history = KeyValueHistory(layout, HEADS, 2, TOKENS, torch.float32, torch.device("cpu"))
    readers = [*layout.readers, *layout.later_readers]
    rows = [reader.rows.stop - reader.rows.start for reader in readers]
    history.take_weights(
        HEADS, [torch.randn(r * HEADS, x.num_columns * HEADS) for r, x in zip(rows, readers, strict=True)]
    )
    slot = torch.randn(2, TOKENS, HEADS, 2)
    sent = torch.empty(history.sent_shape)
    chunks = {chunk.layers[-1]: chunk for chunk in layout.chunks}
    with Moved() as moved:
        for layer in layout.layers:
            history.write_slot(layer, slot[0], slot[1])
            history.read_mixture(layer)
            if layer in chunks:
                history.write_summary(chunks[layer])
        history.write_sent(sent)
    return moved.elements / history.entries[0].numel()


@pytest.mark.parametrize("prices", [ENTRIES, Prices(1, 1)], ids=["entries", "minimal"])
@pytest.mark.parametrize("policy", POLICIES)
def test_forward_moves_the_counted_entries(policy: str, prices: Prices) -> None:
    model = ModelConfig(num_hidden_layers=LAYERS, lime=LimeConfig.model_validate({"history": POLICIES[policy]}))
    for start, stop in CUTS:
        layout = StageLayout(make_policy(model.lime), (range(start, stop),), LAYERS, prices=prices)
        assert moved_in_forward(layout) == architecture_of(model).entries_moved([range(start, stop)], prices)
