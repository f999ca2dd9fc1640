"""The object that describes LIMe over keys and values.

A slot is the keys and values of a layer before rotation. Layer ℓ ≥ 1 mixes the entries that it reads with R_ℓ, signed weights
over (head of the reader) × (entry, head of the entry), the same for keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lime_dist.model.architecture import CHUNKS, ExportFormat, Flops, Sizes, router_name, stage_layout
from lime_dist.model.architectures.lime.kv.traffic import entries_moved
from lime_dist.model.architectures.lime.lime import RoutedLime
from lime_dist.model.crossing import Prices, pairs_by_layer
from lime_dist.model.layout import BLOCK, SUMMARY_BLOCK, StageLayout
from lime_dist.model.policies import Entry
from lime_dist.model.transformer import (
    Activations,
    initialise_shared,
    norm_activations,
    norm_parameters,
    projection_parameters,
    transformer_activations,
    transformer_flops,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lime_dist.model.history import LayerHistory


class KeyValueLime(RoutedLime):
    """``routes: kv``."""

    max_block_layers = BLOCK
    receives_in_place = True
    mixtures_cross = True
    router_parts = ("first_weight", "summary_weight", "weight")
    router_map_obstacle = None

    def check(self) -> None:
        """The configuration's own types are enough."""

    def reads(self, layer: int) -> tuple[Entry, ...]:
        return tuple(self.policy.reads(layer)) if layer > 0 else ()

    @property
    def summary_heads(self) -> int:
        return self.config.key_value_heads

    @property
    def entry_width(self) -> int:
        return 2 * self.config.key_value_heads * self.config.head_size

    def history_gradient_itemsize(self, itemsize: int) -> int:
        """Gradients take the place of the entries."""
        return 0

    # -- modules ------------------------------------------------------------------------------------------------------

    def make_layer(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.lime.kv.layer import KeyValueLayer

        return KeyValueLayer(self.config, layer, self.reads(layer))

    def make_router(self, layer: int) -> nn.Module:
        from lime_dist.model.architectures.lime.kv.router import KeyValueRouter

        return KeyValueRouter(self.config.key_value_heads, self.reads(layer))

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        from lime_dist.model.architectures.lime.kv.history import KeyValueHistory

        config = self.config
        return KeyValueHistory(layout, config.key_value_heads, config.head_size, num_tokens, dtype, device, lead=lead)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def layer_parameters(self, layer: int) -> Sizes:
        read, square = self.reads(layer), self.config.key_value_heads**2
        summaries = [index for index, entry in enumerate(read) if entry.is_summary]
        begin, end = (summaries[0], summaries[-1] + 1) if summaries else (0, 0)
        entries = {"first_weight": begin, "summary_weight": end - begin, "weight": len(read) - end}
        router = {f"self_attn.router.{part}": square * count for part, count in entries.items() if count}
        return projection_parameters(self.config) | norm_parameters(self.config) | router

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """R_ℓ is the identity on the layer's own slot; elsewhere U(−b, b) with b = √(3 / (entries read · G)), or 0
        (``router_init: identity``). A_m: orthonormal rows over the chunk's layers ⊗ I_G. The rest: `initialise_shared`."""
        if name.startswith(CHUNKS):
            self._initialise_summary(value, generator)
        elif ".router." in name:
            self._initialise_router(name, value, generator)
        else:
            initialise_shared(self.config, name, value, generator)

    def _initialise_summary(self, value: Tensor, generator: torch.Generator) -> None:
        import torch

        heads = self.config.key_value_heads
        num_rows, size = value.shape[0] // heads, value.shape[1] // heads
        basis, _ = torch.linalg.qr(torch.randn(size, num_rows, generator=generator, dtype=torch.float64))
        value.copy_(torch.kron(basis.t(), torch.eye(heads, dtype=torch.float64)))

    def _initialise_router(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        import torch

        heads, columns = value.shape
        scale = {"uniform": 1.0, "identity": 0.0}[self.config.lime.router_init]
        bound = scale * math.sqrt(3 / (len(self.policy.reads(int(name.split(".")[2]))) * heads))
        if bound:
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.zero_()
        if name.endswith("router.weight"):
            value[:, columns - heads :] = torch.eye(heads)

    # -- costs --------------------------------------------------------------------------------------------------------

    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        """Beside the transformer: mixing, each pair of a reader and an entry once; in backward the gradients of weights and of
        entries."""
        heads = self.config.key_value_heads
        unit = 2 * heads * heads * 2 * self.config.head_size
        fixed = transformer_flops(self.config, sequence_length)
        pairs = pairs_by_layer(self.policy, self.config.num_hidden_layers, prices)
        return [fixed + Flops(unit * pairs[layer], 2 * unit * pairs[layer]) for layer in layers]

    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        hidden = self.config.hidden_size
        if checkpointing:
            return Activations(per_token=hidden).nbytes(num_tokens, itemsize)
        kept = transformer_activations(self.config, keeps_keys=True) + norm_activations(self.config)
        kept += Activations(per_token=self.entry_width // 2)  # mixed keys, in one piece of memory with the values
        return kept.nbytes(num_tokens, itemsize)

    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """Gradients of the block's slots and of a group's summaries, where newer readers or later stages give them some together;
        with checkpointing also the block's mixtures of older entries, which are computed again."""
        layout = stage_layout(self.config, layers, prices=prices)
        assert layout is not None
        has_older = bool(layout.blocks[block.start].older.runs)
        slots = len(block) * (self._have_shared_gradient(layers, block) + (checkpointing and has_older))
        return (slots + self._summaries_together(layers, block)) * self.entry_width * num_tokens * itemsize

    def _have_shared_gradient(self, layers: range, block: range) -> bool:
        """Whether all slots of a block have a newer reader on the stage, or some of them come back from later stages."""
        slots = {Entry(layer) for layer in block}
        newer = (self.policy.reads(layer) for layer in range(block.stop, layers.stop))
        later = (self.policy.reads(layer) for layer in range(layers.stop, self.config.num_hidden_layers))
        chunks = [set(chunk.sources) for end, chunk in self.chunks.items() if end in layers]
        unfinished = [chunk.sources for end, chunk in self.chunks.items() if end >= layers.stop]
        if len(block) > 1 and (any(slots <= chunk for chunk in chunks) or any(slots <= set(read) for read in newer)):
            return True
        return any(not slots.isdisjoint(read) for read in (*unfinished, *later))

    def _summaries_together(self, layers: range, block: range) -> int:
        """Rows of the group of summaries that backward goes through at a block."""
        chunks = [self.chunks[end] for end in sorted(self.chunks) if end in layers]
        for begin in range(0, len(chunks), SUMMARY_BLOCK):
            group = chunks[begin : begin + SUMMARY_BLOCK]
            if len(group) > 1 and group[0].layers.start <= block.start <= group[-1].layers[-1]:
                return sum(chunk.num_rows for chunk in group)
        return 0

    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """Products go into memory that is there."""
        return 0

    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        layout = stage_layout(self.config, *parts, prices=prices)
        assert layout is not None
        return entries_moved(layout)

    # -- pictures of routers ------------------------------------------------------------------------------------------

    def router_matrix(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        import torch

        names = [f"{router_name(layer)}.{part}" for part in self.router_parts]
        parts = [weights[name] for name in names if name in weights]
        if not parts and layer > 0:
            raise KeyError(names[-1])
        return torch.cat(parts, 1).float() if parts else torch.eye(self.config.key_value_heads)

    def summary_row(self, weight: Tensor, summary: Tensor, entry: Entry) -> Tensor:
        heads = self.config.key_value_heads
        rows = summary[entry.row * heads : (entry.row + 1) * heads]
        return (weight @ rows).view(heads, len(entry.layers), heads)

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    def export_format(self) -> ExportFormat:
        return ExportFormat("LimeForCausalLM", self.export_values, "LimeModel", "key_value_lime.py")

    def check_llama_start(self) -> None:
        lime = self.config.lime
        if lime.router_init != "identity":
            raise ValueError(
                f"model.lime.routes={lime.routes}, model.lime.router_init={lime.router_init} would not start as the "
                "original does; set model.lime.routes=kv and model.lime.router_init=identity"
            )
