"""The model as a flat list of layers, and the functions that run it: whole (`Decoder`, to which tests compare all parallel runs)
or one stage of it.

The list reads like the model: embedding, decoder layers, final norm, output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lime_dist.config.schema import Checkpointing, ModelConfig
from lime_dist.model.architecture import CHUNKS, architecture_of, chunk_ends, router_name, stage_layout
from lime_dist.model.blocks import Attention, PreNormLayer, Router
from lime_dist.model.history import LayerHistory
from lime_dist.model.init import build
from lime_dist.model.layers import Embedding
from lime_dist.model.layout import StageLayout
from lime_dist.model.logits import LogitForm
from lime_dist.model.parameters import FINAL_NORM
from lime_dist.model.recomputation import run_layer
from lime_dist.model.summaries import ChunkSummary
from lime_dist.model.transformer import EMBEDDING


@dataclass(frozen=True)
class LayerSpec:
    """One element of the flat list: the prefix of its exported parameter names, and a function that makes the module."""

    name: str
    make: Callable[[], nn.Module]

    def exported_names(self, module: nn.Module) -> dict[str, str]:
        """Map the local name of every parameter of the module to its exported name."""
        return {local: f"{self.name}.{local}" for local, _ in module.named_parameters()}

    def build(self, config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Make the module with its initial values."""
        with torch.device("meta"):
            module = self.make()
        build(module, self.exported_names(module), config, seed, device, dtype)
        return module


def decoder_layers(config: ModelConfig) -> list[LayerSpec]:
    """The flat list: embedding, L decoder layers, the summary of each chunk after the chunk's last layer, norm, and output
    projection (the embedding itself if tied)."""
    embedding = LayerSpec(EMBEDDING, partial(Embedding, config.vocab_size, config.hidden_size))
    if config.tie_word_embeddings:
        head = embedding
    else:
        head = LayerSpec("lm_head", partial(nn.Linear, config.hidden_size, config.vocab_size, bias=False))
    architecture, chunks = architecture_of(config), chunk_ends(config)
    layers: list[LayerSpec] = []
    for layer in range(config.num_hidden_layers):
        layers.append(LayerSpec(layer_name(layer), partial(architecture.make_layer, layer)))
        if (chunk := chunks.get(layer)) is not None:
            make_summary = partial(architecture.make_summary, chunk)
            layers.append(LayerSpec(f"{CHUNKS}{chunk.index}", make_summary))
    norm = LayerSpec(FINAL_NORM, architecture.make_final_norm)
    return [embedding, *layers, norm, head]


def layer_name(layer: int) -> str:
    """Prefix of the exported parameter names of a decoder layer."""
    return f"model.layers.{layer}"


def open_history(
    config: ModelConfig,
    layout: StageLayout | None,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    lead: int = 0,
) -> LayerHistory | None:
    """An empty history of one micro-batch; None if there is no layout. ``lead``: see `Architecture.make_history`."""
    return None if layout is None else architecture_of(config).make_history(layout, num_tokens, dtype, device, lead)


def embed(config: ModelConfig, embedding: nn.Module, tokens_BT: Tensor) -> Tensor:
    """The input of the first decoder layer, [B, T, *hidden_shape]."""
    return architecture_of(config).first_input(embedding(tokens_BT))


def later_readers(config: ModelConfig, layout: StageLayout | None) -> list[LayerSpec]:
    """The routers of later layers and the summaries of later chunks whose weights a stage needs, because it adds to their partial
    mixtures (`StageLayout.later_readers`)."""
    if layout is None:
        return []
    architecture = architecture_of(config)
    return [
        *(LayerSpec(router_name(n), partial(architecture.make_router, n)) for n in layout.later_layers),
        *(LayerSpec(f"{CHUNKS}{c.index}", partial(architecture.make_summary, c)) for c in layout.later_chunks),
    ]


def reader_weights(reader: nn.Module) -> Tensor:
    """The weights of a router or of a chunk summary."""
    return reader.weight if isinstance(reader, ChunkSummary) else cast(Tensor, cast(Router, reader).matrix())


def run_layers(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    history: LayerHistory | None,
    activation_checkpointing: Checkpointing,
    later: Sequence[nn.Module] = (),
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run consecutive decoder layers and the chunk summaries between them.

    Args:
        activation_checkpointing: what of each layer backward computes again (`recomputation`).
        later: the modules of `later_readers`.
        starts_BT: where documents begin (`documents.document_starts`); None: attention and positions cross them.

    Returns:
        The hidden state, and the tensors of the autograd graph that ``history.pack`` needs.
    """
    released: list[Tensor] = []
    decoder_layers = [layer for layer in layers if not isinstance(layer, ChunkSummary)]
    positions = cast(Attention, decoder_layers[0].self_attn).positions(hidden, starts_BT)
    try:
        if history is not None:
            others = [*(layer for layer in layers if isinstance(layer, ChunkSummary)), *later]
            routing = [cast(PreNormLayer, layer).routing() for layer in decoder_layers]
            history.open(routing, [reader_weights(reader) for reader in others])
            chunks = iter(history.layout.chunks_of(history.part))
        for layer in layers:
            if isinstance(layer, ChunkSummary):
                assert history is not None
                history.summarise(next(chunks))
            else:
                hidden = run_layer(layer, hidden, history, positions, activation_checkpointing)
    finally:
        if history is not None:
            released = history.release()
    return hidden, released


def apply_norm(config: ModelConfig, norm: nn.Module, hidden: Tensor) -> Tensor:
    """What the output projection takes, [B, T, D], from the output of the last decoder layer."""
    return cast(Tensor, norm(architecture_of(config).last_output(hidden)))


def apply_head(config: ModelConfig, norm: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [B, T, V] from the output of the last decoder layer. The head is an output projection or a tied embedding."""
    normed_BTD = apply_norm(config, norm, hidden)
    return LogitForm.of(config).logits(head.logits(normed_BTD) if isinstance(head, Embedding) else head(normed_BTD))


class Decoder(nn.Module):
    """The whole decoder in one process: tokens [B, T] -> logits [B, T, V].

    Its parameter names (``named_parameters``, ``state_dict``) are the exported names.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        activation_checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.layout = stage_layout(config, range(config.num_hidden_layers))
        specs = decoder_layers(config)
        modules = [spec.build(config, seed, torch.device(device), dtype) for spec in specs]
        if specs[-1] is specs[0]:
            modules[-1] = modules[0]
        for spec, module in zip(specs, modules, strict=True):
            _register(self, spec.name, module)
        self.specs = specs

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Logits. ``starts_BT``: see `run_layers`."""
        embedding, *layers, norm, head = (self.get_submodule(spec.name) for spec in self.specs)
        hidden = embed(self.config, embedding, tokens_BT)
        history = open_history(self.config, self.layout, tokens_BT.numel(), hidden.dtype, hidden.device)
        hidden, _ = run_layers(layers, hidden, history, self.activation_checkpointing, starts_BT=starts_BT)
        return apply_head(self.config, norm, head, hidden)


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` the submodule with this dotted name; parents of numbered modules become a ``ModuleList``."""
    *path, last = name.split(".")
    for part, child in zip(path, name.split(".")[1:], strict=True):
        if part not in root._modules:
            root.add_module(part, nn.ModuleList() if child.isdigit() else nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def build_decoder(
    config: ModelConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: Checkpointing = False,
) -> Decoder:
    """The whole decoder with initial values, which are determined by ``seed``."""
    return Decoder(config, seed, device, dtype, activation_checkpointing)
