"""The members of an `Architecture` that say: there is no layer history. For architectures to inherit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lime_dist.model.chunks import Chunk
from lime_dist.model.crossing import Prices
from lime_dist.model.layout import StageLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lime_dist.model.history import LayerHistory


class WithoutHistory:
    """Nothing crosses a stage boundary but the hidden state."""

    policy = None
    has_configurable_policy = False
    max_block_layers = 1
    entry_width = 0
    receives_in_place = False
    router_map_obstacle = "it has no layer history"
    router_parameters: Sequence[str] = ()

    def entries_read(self, layer: int) -> int:
        return 0

    def slots_kept(self, layer: int) -> int:
        return 0

    def history_gradient_itemsize(self, itemsize: int) -> int:
        return 0

    def make_summary(self, chunk: Chunk) -> nn.Module:
        raise NotImplementedError("there is no layer history")

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        raise NotImplementedError("there is no layer history")

    def summary_parameters(self, chunk: Chunk) -> int:
        raise NotImplementedError("there is no layer history")

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        return 0

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        return 0

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        return 0.0

    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        raise NotImplementedError("there is no layer history")
