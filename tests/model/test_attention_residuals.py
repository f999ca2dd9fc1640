"""Protects attention residuals: special cases, initial values, what crosses boundaries, misuse of the history, 128 layers in bf16."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support import reference
from support.models import small
from torch import Tensor

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.config.schema import ModelConfig, OptimizerConfig
from lime_dist.model.architecture import architecture_of, stage_layout
from lime_dist.model.architectures.attention_residuals.blocks import GROUP, Blocks
from lime_dist.model.cost import payload_bytes
from lime_dist.model.decoder import Decoder, open_history

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS = torch.arange(20).view(2, 10)


def config_of(size: int, **changes: object) -> ModelConfig:
    return small(architecture="attention_residuals", attention_residuals={"block_size": size}, **changes)


def sublayer_output(config: ModelConfig, decoder: Decoder, sublayer: int, mixed: Tensor) -> Tensor:
    weights, layer = dict(decoder.named_parameters()), sublayer // 2
    prefix = f"model.layers.{layer}."
    name = "post_attention_layernorm" if sublayer % 2 else "input_layernorm"
    normed = reference.rms_norm(mixed, weights[f"{prefix}{name}.weight"], config.rms_norm_eps)
    if sublayer % 2:
        return reference.mlp(config, weights, prefix, normed)
    return reference.attention(config, weights, prefix, layer, normed, {})


@torch.no_grad()
def test_block_size_1_is_full() -> None:
    """Every sub-layer chooses from the embedding and every earlier output, v_0 … v_{l−1}, without any block."""
    config = config_of(1, num_hidden_layers=5)
    decoder = build_decoder(config, dtype=torch.float64)
    for name, parameter in decoder.named_parameters():
        perturb(name, parameter)
    weights = dict(decoder.named_parameters())

    def read(own: str, values: list[Tensor]) -> Tensor:
        keys = [reference.rms_norm(v, weights[own + "key_layernorm.weight"], config.rms_norm_eps) for v in values]
        shares = torch.stack([key @ weights[own + "query"] for key in keys]).softmax(0)
        return (shares.unsqueeze(-1) * torch.stack(values)).sum(0)

    values = [decoder.model.embed_tokens(TOKENS)]
    for sublayer in range(10):
        own = f"model.layers.{sublayer // 2}.{'mlp' if sublayer % 2 else 'attn'}_residual."
        values.append(sublayer_output(config, decoder, sublayer, read(own, values) if sublayer else values[0]))
    wanted = reference.head(config, weights, read("model.layers.4.output_residual.", values))
    torch.testing.assert_close(decoder(TOKENS), wanted, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_new_model_reads_the_mean(size: int) -> None:
    """Queries start at 0, as the paper says: the mean of the finished blocks and the sum of the own one so far."""
    config = config_of(size, num_hidden_layers=5)
    decoder = build_decoder(config, dtype=torch.float64)
    queries = [p for name, p in decoder.named_parameters() if name.endswith("_residual.query")]
    assert len(queries) == 2 * 5 and not any(query.any() for query in queries), "sub-layer 0 has nothing to choose from"
    blocks, own = [decoder.model.embed_tokens(TOKENS)], []
    for sublayer in range(10):
        sources = [*blocks, sum(own)] if own else blocks
        own.append(sublayer_output(config, decoder, sublayer, torch.stack(sources).mean(0)))
        if len(own) == size:
            blocks, own = [*blocks, sum(own)], []
    last = torch.stack([*blocks, sum(own)] if own else blocks).mean(0)
    wanted = reference.head(config, dict(decoder.named_parameters()), last)
    torch.testing.assert_close(decoder(TOKENS), wanted, rtol=0, atol=1e-11)


def test_what_crosses_a_boundary() -> None:
    """The running sum, and every block that was finished before it: ⌈2b/S⌉ + 1 states."""
    for size in (1, 3, 4, 8, 100):
        config = config_of(size, num_hidden_layers=12)
        crossing = [payload_bytes(config, boundary, 1, 1) // config.hidden_size for boundary in range(1, 12)]
        assert crossing == [math.ceil(2 * boundary / size) + 1 for boundary in range(1, 12)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9, 24])
def test_groups_read_the_same_older_blocks(size: int) -> None:
    """Groups are disjoint, at most `GROUP` long, and begin with a block or lie in one."""
    blocks, sublayer = Blocks(size), 0
    while sublayer < 60:
        group = blocks.group(sublayer)
        assert group.start == sublayer and 0 < len(group) <= GROUP
        assert all(blocks.group(one) == group for one in group)
        assert blocks.begins(sublayer) or blocks.finished(group[-1]) == blocks.finished(sublayer)
        sublayer = group.stop


def test_queries_learn_at_the_rate_of_the_model_without_weight_decay() -> None:
    architecture = architecture_of(config_of(4))
    for leaf in ("query", "key_layernorm.weight"):
        assert architecture.parameter_group(f"model.layers.3.mlp_residual.{leaf}") == "plain"


def test_misuse_of_the_history_is_an_error() -> None:
    config = config_of(4, num_hidden_layers=4)
    decoder = build_decoder(config)
    loss = decoder(TOKENS).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run only once over a layer history"):
        loss.backward()
    history = open_history(config, stage_layout(config, range(4)), 20, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="sub-layer 4 wrote block 1 after 0 blocks"):
        history.read(4, torch.zeros(2, 10, config.hidden_size))


@pytest.mark.slow
def test_128_layers_in_bf16_train_without_a_spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the initial values; 20 steps, of which five warm up. (`benchmarks/depth_stability.py` compares all architectures.)"""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from depth_stability import train

    config = config_of(8, num_hidden_layers=128, hidden_size=32, intermediate_size=64, num_attention_heads=2,
                       num_key_value_heads=2, vocab_size=256)  # fmt: skip
    course = train(config, OptimizerConfig(), torch.bfloat16, steps=20, batch=1, length=32)
    assert all(map(math.isfinite, course.losses + course.norms))
    assert max(course.losses) < 1.02 * course.losses[0]
