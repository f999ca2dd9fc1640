"""LIMe over keys and values as in the paper's published code: every layer copies all earlier slots.

Autograd keeps each copy for the gradient of the router, so L layers hold L·(L + 1)/2 slots. This is the baseline of
`step_cost.py`. It runs the layers of a decoder from `lime_dist.build_decoder`, with the same parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lime_dist import build_decoder
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architectures.lime.kv.layer import KeyValueLayer
from lime_dist.model.architectures.lime.kv.router import KeyValueRouter
from lime_dist.model.decoder import Decoder, apply_head, embed
from lime_dist.model.layers import language_model_loss


def copying_logits(decoder: Decoder, tokens_BT: Tensor) -> Tensor:
    """Return the logits [B, T, V] of a decoder with ``routes: kv`` and ``policy: full``."""
    config = decoder.config
    embedding, *layers, norm, head = (decoder.get_submodule(spec.name) for spec in decoder.specs)
    hidden = embed(config, embedding, tokens_BT)
    history = hidden.new_empty(0, 2, tokens_BT.numel(), config.head_size)
    for layer in layers:
        if decoder.activation_checkpointing:
            hidden, history = checkpoint(
                copying_layer, layer, hidden, history, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden, history = copying_layer(layer, hidden, history)
    return apply_head(config, norm, head, hidden)


def copying_layer(layer: nn.Module, x_BTD: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Run one layer. ``history`` [ℓ·G, 2, N, d] holds the slots of the ℓ layers before it; it is returned with one more slot."""
    assert isinstance(layer, KeyValueLayer)
    attention = layer.self_attn
    positions = attention.positions(x_BTD, None)
    batch, length, _ = x_BTD.shape
    q_BHTd, *own_BTC = layer.project(x_BTD, positions)
    slot = torch.stack([t.view(batch * length, -1, attention.head_size).transpose(0, 1) for t in own_BTC], dim=1)
    history = torch.cat([history, slot])
    mixed = slot
    if attention.router is not None:
        assert isinstance(attention.router, KeyValueRouter)
        mixed = (attention.router.weight @ history.flatten(1)).view_as(slot)
    k_BGTd, v_BGTd = (t.view(-1, batch, length, attention.head_size).transpose(0, 1) for t in mixed.unbind(1))
    return layer.finish(x_BTD, q_BHTd, k_BGTd, v_BGTd, positions), history


def copied_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Return the bytes that the copies hold when backward begins, by formula.

    Layer ℓ keeps ℓ + 1 slots, and the gradient of the last layer needs one more history. With checkpointing, layer ℓ keeps only
    its input of ℓ slots, and one layer is computed again.
    """
    layers = config.num_hidden_layers
    slot = 2 * config.key_value_heads * config.head_size * num_tokens * dtype.itemsize
    kept = sum(range(1, layers)) + layers if checkpointing else sum(range(2, layers + 1))
    return (kept + layers) * slot


def check_equality() -> str:
    """Compare with the decoder's ``full`` in float64 at a small size; return one line with the differences.

    Raises:
        AssertionError: loss or gradients differ.
    """
    worst_loss = worst_gradient = 0.0
    for heads in (4, 2):
        config = ModelConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=heads,
        )  # fmt: skip
        decoder = build_decoder(config, dtype=torch.float64)
        tokens, labels = random_batch(2, 16, config.vocab_size, "cpu")
        losses, gradients = [], []
        for logits in (decoder(tokens), copying_logits(decoder, tokens)):
            loss = language_model_loss(logits, labels)
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
        worst_loss = max(worst_loss, abs(losses[0] - losses[1]))
        for own, copied in zip(*gradients, strict=True):
            worst_gradient = max(worst_gradient, float((own - copied).abs().max() / own.abs().max()))
    assert worst_loss <= 1e-12, f"copying and full differ in their loss by {worst_loss}"
    assert worst_gradient <= 1e-12, f"copying and full differ in a gradient by {worst_gradient}, relative"
    return (
        f"check: copying equals full in float64 (6 layers, G 4 and 2): loss to {worst_loss:.0e}, "
        f"gradients to {worst_gradient:.0e}, relative"
    )


def random_batch(batch: int, length: int, vocab_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, [B, T] each, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(vocab_size, (2, batch, length), generator=generator).to(device)
    return both[0], both[1]
