"""Protects mixture-of-depths attention: special cases, kernels, what crosses boundaries, misuse of the history, 128 layers in bf16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.config.schema import LimeConfig, ModelConfig, OptimizerConfig
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of, model_crossings
from lime_dist.model.architectures.lime.depth import kernels
from lime_dist.model.crossing import Prices
from lime_dist.model.documents import tensor_mask

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS = torch.arange(20).view(2, 10)


def config_of(history: dict[str, Any] | None = None, mlp_entries: bool = False, **changes: object) -> ModelConfig:
    lime = {"depth_attention": "moda", "mlp_entries": mlp_entries, "history": history or {"policy": "full"}}
    return small(lime=lime, **changes)


@pytest.mark.parametrize("mlp_entries", [False, True])
def test_without_earlier_layers_it_is_llama(mlp_entries: bool) -> None:
    """No layer reads another one: the same parameters, logits and gradients, and nothing crosses a boundary."""
    alone = config_of({"policy": "first_last", "first": 0, "last": 0}, mlp_entries)
    ours, llama = (
        build_decoder(alone, dtype=torch.float64),
        build_decoder(small(architecture="llama"), dtype=torch.float64),
    )
    for decoder in (ours, llama):
        for name, parameter in decoder.named_parameters():
            perturb(name, parameter)
        decoder(TOKENS).square().sum().backward()
    theirs = dict(llama.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == theirs.keys()
    assert torch.equal(ours(TOKENS), llama(TOKENS))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-12)
    assert not any(len(crossing) for crossing in model_crossings(alone))
    assert cost.layer_flops(alone, 10) == cost.layer_flops(small(architecture="llama"), 10)


def test_the_position_of_a_token_does_not_change_what_it_reads_of_earlier_layers() -> None:
    """At one token, the rotations of query and key cancel: with a sequence of one token repeated, only the sequence's part of the
    softmax depends on the position, and all of its values are equal."""
    decoder = build_decoder(config_of(), dtype=torch.float64)
    logits = decoder(torch.full((1, 6), 7))
    alone = decoder(torch.full((1, 1), 7))
    assert not torch.allclose(logits[:, -1:], alone, atol=1e-6), (
        "more keys of the sequence take from those of earlier layers"
    )
    first = decoder(torch.tensor([[7, 3, 4]]))[:, :1]
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)


def test_mlps_project_only_what_is_read() -> None:
    """Else a projection would have no gradient. The last layer is read by nobody."""
    full, dilated = (
        config_of(history, mlp_entries=True)
        for history in (None, {"policy": "dilated", "stride": 4, "first": 0, "last": 0})
    )
    for config, read in ((full, set(range(10))), (dilated, {0, 4, 8})):
        names = {name for name, _ in build_decoder(config).named_parameters() if ".mlp.k_proj" in name}
        assert names == {f"model.layers.{layer}.mlp.k_proj.weight" for layer in read}
        assert {architecture_of(config).parameter_group(name) for name in names} == {"matrices"}


@pytest.mark.parametrize("mlp_entries", [False, True])
def test_entries_cross_and_no_partial_mixtures(mlp_entries: bool) -> None:
    """b entries before layer b: 2·G·d elements each, twice that with MLPs, whatever the prices."""
    config = config_of(mlp_entries=mlp_entries)
    width = 2 * config.key_value_heads * config.head_size * (2 if mlp_entries else 1)
    for boundary in range(1, config.num_hidden_layers):
        crossing = model_crossings(config, Prices(1, 1))[boundary]
        assert len(crossing.entries) == boundary and not crossing.mixtures
        assert cost.payload_bytes(config, boundary, 1, 1, Prices(1, 1)) == config.hidden_size + boundary * width


def test_flops_over_llama() -> None:
    """4·H·d for every pair that is read, per token, forward; 2.5 times that backward."""
    config = config_of()
    ours, llama = (cost.layer_flops(c, 10) for c in (config, small(architecture="llama")))
    pair = 4 * config.num_attention_heads * config.head_size
    for layer, (flops, plain) in enumerate(zip(ours, llama, strict=True)):
        assert (flops.forward - plain.forward, flops.backward - plain.backward) == (layer * pair, 2.5 * layer * pair)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_kernel_of_last_resort(groups: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has none: the same as the CPU's, in windows that end before and at the last token. The gradients are those in a
    softmax whose sum is twice as large: of as many other keys, with values 0."""
    monkeypatch.setattr(kernels, "WINDOW", 4)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 10, heads, 6, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads in (4, groups, groups)
    )
    gradient = torch.randn(q.shape, generator=generator, dtype=q.dtype)
    mask = tensor_mask(torch.tensor([[0] * 3 + [3] * 7, [0] * 10]), q.dtype) if masked else None
    results = []
    for attend, gradients in (
        (kernels.attend, kernels.gradients),
        (kernels._plain, lambda *args: kernels._plain_gradients(*args[:4], *args[4][:2], args[5])),
    ):
        attended = attend(q, k, v, mask)
        doubled = kernels.Attended(attended.out_BHTd / 2, attended.sums_BHT + math.log(2), attended.state)
        results.append((attended.out_BHTd, attended.sums_BHT, *gradients(gradient, q, k, v, doubled, mask)))
    for cpu, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, cpu, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"routes": "hidden", "depth_attention": "moda"}, "model.lime.depth_attention=moda needs model.lime.routes=kv"),
        ({"mlp_entries": True}, "model.lime.mlp_entries=True needs model.lime.depth_attention=moda"),
        (
            {"depth_attention": "moda", "router_init": "identity"},
            "model.lime.router_init=identity needs model.lime.depth_attention=none",
        ),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        LimeConfig.model_validate(keys)


def test_misuse_of_the_history_is_an_error() -> None:
    decoder = build_decoder(config_of(num_hidden_layers=4))
    loss = decoder(TOKENS).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run only once over a layer history"):
        loss.backward()


@pytest.mark.slow
def test_128_layers_in_bf16_train_without_a_spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the initial values; 8 steps, of which five warm up. (`benchmarks/depth_stability.py` makes more.)"""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from depth_stability import train

    lime = {"depth_attention": "moda", "mlp_entries": True}
    config = small(lime=lime, num_hidden_layers=128, hidden_size=32, intermediate_size=64, num_attention_heads=2,
                   num_key_value_heads=2, vocab_size=256)  # fmt: skip
    course = train(config, OptimizerConfig(), torch.bfloat16, steps=8, batch=1, length=32)
    assert all(map(math.isfinite, course.losses + course.norms))
    assert max(course.losses) < 1.02 * course.losses[0]
