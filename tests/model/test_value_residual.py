"""Protects value residual: its special cases, initial values, the weights it reports, and the sum of its gradients."""

from __future__ import annotations

import pytest
import torch
from support.models import small

from benchmarks.equality import perturb
from lime_dist import build_decoder, load_config
from lime_dist.errors import LimeError
from lime_dist.model.architecture import architecture_of
from lime_dist.model.architectures.value_residual.history import FirstValues
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import FirstLastHistory
from lime_dist.monitor.routers import has_map, router_map

TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("learnable", [False, True])
def test_with_weight_0_it_is_llama(learnable: bool) -> None:
    config = small(architecture="value_residual", value_residual={"weight": 0, "learnable": learnable})
    model, llama = (
        build_decoder(config, dtype=torch.float64),
        build_decoder(small(architecture="llama"), dtype=torch.float64),
    )
    for name, parameter in llama.named_parameters():
        perturb(name, parameter)
        model.get_parameter(name).data.copy_(parameter)
    assert torch.equal(model(TOKENS), llama(TOKENS))


def test_learnable_weights_start_as_the_fixed_ones() -> None:
    models = [
        build_decoder(small(architecture="value_residual", value_residual={"weight": 0.25, "learnable": learnable}))
        for learnable in (False, True)
    ]
    assert torch.equal(models[0](TOKENS), models[1](TOKENS))
    assert models[1].get_parameter("model.layers.3.self_attn.router.weight").tolist() == [0.25, 0.75]
    assert "model.layers.0.self_attn.router.weight" not in dict(models[1].named_parameters())


def test_the_default_is_the_mean_of_both_values() -> None:
    assert load_config(None).model.value_residual.model_dump() == {"weight": 0.5, "learnable": False}
    with pytest.raises(LimeError, match="model.value_residual.weight=1.5"):
        load_config(None, ["model.value_residual.weight=1.5"])


def test_the_map_shows_the_learnable_weights() -> None:
    config = small(architecture="value_residual", value_residual={"weight": 0.25, "learnable": True})
    wanted = torch.diag(torch.full((11,), 0.75))
    wanted[:, 0] = 0.25
    wanted[0, 0] = 1
    weights = dict(build_decoder(config).named_parameters())
    assert set(architecture_of(config).router_parameters) <= weights.keys()
    assert torch.equal(router_map(config, weights), wanted)
    assert not has_map(small(architecture="value_residual"))
    assert not architecture_of(small(architecture="value_residual")).router_parameters


def test_gradients_of_many_readers_are_summed_in_float32() -> None:
    """In bf16, a sum of 1 and 255 gradients of 2⁻⁹ would stay 1: each is half of the last bit."""
    history = FirstValues(StageLayout(FirstLastHistory(1, 0), (range(257),), 257))
    first = torch.zeros(1, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    history.write(first)
    gradients = [1.0] + 255 * [2**-9]
    mixed = [history.mix(torch.zeros_like(first), 1.0, 1.0) * gradient for gradient in gradients]
    torch.stack(mixed).sum().backward()
    assert first.grad is not None and first.grad.flatten().tolist() == [1.5, 1.5]
