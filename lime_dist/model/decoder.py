"""The model as a flat list of layers, and what runs it: whole (`Decoder`, the oracle of all parallel runs) or a stage of it.

Reading the list top to bottom is reading the model: embedding, decoder layers, last norm, output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lime_dist.config.schema import ModelConfig
from lime_dist.model.blocks import Attention, make_layer
from lime_dist.model.hidden_history import HiddenHistory
from lime_dist.model.history import LayerHistory
from lime_dist.model.init import build
from lime_dist.model.key_value_history import KeyValueHistory
from lime_dist.model.layers import Embedding, RMSNorm
from lime_dist.model.layout import StageLayout, stage_layout, summarised_chunks
from lime_dist.model.policies import make_policy
from lime_dist.model.routing import ChunkSummary

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the flat list: the prefix of its exported parameter names, and how it is made."""

    name: str
    make: Callable[[], nn.Module]

    def exported_names(self, module: nn.Module) -> dict[str, str]:
        """Exported name of every parameter of the module, by local name."""
        return {local: f"{self.name}.{local}" for local, _ in module.named_parameters()}

    def build(self, config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Make the module with its initial values."""
        with torch.device("meta"):
            module = self.make()
        build(module, self.exported_names(module), config, seed, device, dtype)
        return module


def decoder_layers(config: ModelConfig) -> list[LayerSpec]:
    """The flat list: embedding, L decoder layers, each chunk's summary after the chunk's last layer, norm, output
    projection (the embedding itself when tied)."""
    embedding = LayerSpec(EMBEDDING, partial(Embedding, config.vocab_size, config.hidden_size))
    if config.tie_word_embeddings:
        head = embedding
    else:
        head = LayerSpec("lm_head", partial(nn.Linear, config.hidden_size, config.vocab_size, bias=False))
    summaries = {}
    if config.architecture == "lime":
        heads = config.key_value_heads if config.lime.routes == "kv" else 1
        for chunk in summarised_chunks(make_policy(config.lime), config.num_hidden_layers):
            make = partial(ChunkSummary, chunk.num_rows * heads, len(chunk.layers) * heads)
            summaries[chunk.layers[-1]] = LayerSpec(f"model.history.chunks.{chunk.index}", make)
    layers: list[LayerSpec] = []
    for layer in range(config.num_hidden_layers):
        layers.append(LayerSpec(layer_name(layer), partial(make_layer, config, layer)))
        if layer in summaries:
            layers.append(summaries[layer])
    norm = LayerSpec("model.norm", partial(RMSNorm, config.hidden_size, config.rms_norm_eps))
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
    """An empty history of one micro-batch; None without a layout. ``lead``: see `KeyValueHistory`."""
    if layout is None:
        return None
    if config.lime.routes == "hidden":
        return HiddenHistory(layout, num_tokens, config.hidden_size, config.rms_norm_eps, dtype, device)
    return KeyValueHistory(layout, config.key_value_heads, config.head_size, num_tokens, dtype, device, lead=lead)


def embed(config: ModelConfig, embedding: nn.Module, tokens_BT: Tensor) -> Tensor:
    """What the first decoder layer takes: [B, T, D]; with Hyper-Connections every stream starts as it, [B, T, n, D]."""
    hidden_BTD = embedding(tokens_BT)
    if config.architecture == "hyper":
        return hidden_BTD.unsqueeze(-2).expand(-1, -1, config.hyper.rate, -1)
    return hidden_BTD


def run_layers(
    layers: Sequence[nn.Module], hidden: Tensor, history: LayerHistory | None, activation_checkpointing: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run consecutive decoder layers and the chunk summaries between them; with checkpointing, only each layer's input is
    kept and the rest is computed again.

    Returns:
        The hidden state, and what ``history.pack`` needs of the autograd graph.
    """
    released: list[Tensor] = []
    try:
        if history is not None:
            decoders = [layer for layer in layers if not isinstance(layer, ChunkSummary)]
            routers = [cast(Attention, layer.self_attn).router for layer in decoders]
            summaries = [layer.weight for layer in layers if isinstance(layer, ChunkSummary)]
            history.open([None if router is None else router.matrix() for router in routers], summaries)
            chunks = iter(history.layout.chunks)
        for layer in layers:
            if isinstance(layer, ChunkSummary):
                assert history is not None
                history.summarise(next(chunks))
            elif activation_checkpointing and torch.is_grad_enabled():
                hidden = cast(
                    Tensor,
                    checkpoint(
                        layer,
                        hidden,
                        history,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=partial(_checkpoint_contexts, history),
                    ),
                )
            else:
                hidden = layer(hidden, history)
    finally:
        if history is not None:
            released = history.release()
    return hidden, released


def _checkpoint_contexts(
    history: LayerHistory | None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the forward pass of a checkpointed layer, and what surrounds its recomputation."""
    return nullcontext(), nullcontext() if history is None else history.recomputing()


def apply_head(config: ModelConfig, norm: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [B, T, V] from what the last decoder layer gives; the head is an output projection or a tied embedding."""
    if config.architecture == "hyper":
        hidden = hidden.sum(-2)
    normed_BTD = norm(hidden)
    return head.logits(normed_BTD) if isinstance(head, Embedding) else head(normed_BTD)


class Decoder(nn.Module):
    """The whole decoder in one process: tokens [B, T] -> logits [B, T, V].

    The names of its parameters (``named_parameters``, ``state_dict``) are the exported names.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.layout = stage_layout(config, 0, config.num_hidden_layers)
        specs = decoder_layers(config)
        modules = [spec.build(config, seed, torch.device(device), dtype) for spec in specs]
        if specs[-1] is specs[0]:
            modules[-1] = modules[0]
        for spec, module in zip(specs, modules, strict=True):
            _register(self, spec.name, module)
        self.specs = specs

    def forward(self, tokens_BT: Tensor) -> Tensor:
        embedding, *layers, norm, head = (self.get_submodule(spec.name) for spec in self.specs)
        hidden = embed(self.config, embedding, tokens_BT)
        history = open_history(self.config, self.layout, tokens_BT.numel(), hidden.dtype, hidden.device)
        hidden, _ = run_layers(layers, hidden, history, self.activation_checkpointing)
        return apply_head(self.config, norm, head, hidden)


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` the submodule of that dotted name; what has numbers for names is a list."""
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
    activation_checkpointing: bool = False,
) -> Decoder:
    """The single-process decoder with its initial values, which are a function of ``seed``."""
    return Decoder(config, seed, device, dtype, activation_checkpointing)
