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
from lime_dist.model.history import LayerHistory, StageLayout, make_policy
from lime_dist.model.init import build
from lime_dist.model.key_value_history import KeyValueHistory
from lime_dist.model.layers import Embedding, RMSNorm

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
    """The flat list: embedding, L decoder layers, norm, output projection (the embedding itself when tied)."""
    embedding = LayerSpec(EMBEDDING, partial(Embedding, config.vocab_size, config.hidden_size))
    if config.tie_word_embeddings:
        head = embedding
    else:
        head = LayerSpec("lm_head", partial(nn.Linear, config.hidden_size, config.vocab_size, bias=False))
    return [
        embedding,
        *(
            LayerSpec(f"model.layers.{layer}", partial(make_layer, config, layer))
            for layer in range(config.num_hidden_layers)
        ),
        LayerSpec("model.norm", partial(RMSNorm, config.hidden_size, config.rms_norm_eps)),
        head,
    ]


def stage_layout(config: ModelConfig, start: int, stop: int) -> StageLayout | None:
    """Where a stage of decoder layers ``start`` … ``stop``−1 keeps its history; None for models without one."""
    if config.architecture != "lime":
        return None
    return StageLayout(make_policy(config.lime), start, stop, config.num_hidden_layers)


def open_history(
    config: ModelConfig, layout: StageLayout | None, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> LayerHistory | None:
    """An empty history of one micro-batch; None without a layout."""
    if layout is None:
        return None
    if config.lime.routes == "hidden":
        return HiddenHistory(layout, num_tokens, config.hidden_size, dtype, device)
    return KeyValueHistory(layout, config.key_value_heads, config.head_size, num_tokens, dtype, device)


def embed(config: ModelConfig, embedding: nn.Module, tokens_BT: Tensor) -> Tensor:
    """What the first decoder layer takes: [B, T, D]; with Hyper-Connections every stream starts as it, [B, T, n, D]."""
    hidden_BTD = embedding(tokens_BT)
    if config.architecture == "hyper":
        return hidden_BTD.unsqueeze(-2).expand(-1, -1, config.hyper.rate, -1)
    return hidden_BTD


def run_layers(
    layers: Sequence[nn.Module], hidden: Tensor, history: LayerHistory | None, activation_checkpointing: bool
) -> tuple[Tensor, Tensor | None]:
    """Run consecutive decoder layers; with checkpointing, only each layer's input is kept and the rest is computed again.

    Returns:
        The hidden state, and the history's token (see `history.py`) for what comes after the layers.
    """
    token = None
    try:
        if isinstance(history, KeyValueHistory):
            routers = [cast(Attention, layer.self_attn).router for layer in layers]
            history.open([None if router is None else cast(Tensor, router.weight) for router in routers])
        for layer in layers:
            if activation_checkpointing and torch.is_grad_enabled():
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
            token = history.release_token()
    return hidden, token


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
        embedding, *layers, norm, head = modules
        self.model = nn.Module()
        self.model.embed_tokens = embedding
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = norm
        self.lm_head = None if head is embedding else head

    def forward(self, tokens_BT: Tensor) -> Tensor:
        embedding = cast(nn.Module, self.model.embed_tokens)
        hidden = embed(self.config, embedding, tokens_BT)
        history = open_history(self.config, self.layout, tokens_BT.numel(), hidden.dtype, hidden.device)
        layers = cast(Sequence[nn.Module], self.model.layers)
        hidden, _ = run_layers(layers, hidden, history, self.activation_checkpointing)
        return apply_head(self.config, cast(nn.Module, self.model.norm), self.lm_head or embedding, hidden)


def build_decoder(
    config: ModelConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
) -> Decoder:
    """The single-process decoder with its initial values, which are a function of ``seed``."""
    return Decoder(config, seed, device, dtype, activation_checkpointing)
