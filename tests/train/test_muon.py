"""Tests of Muon's update against its equations and against torch's own. (test_new_optimizer.py takes it through training.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lime_dist import build_decoder, load_config
from lime_dist.model.architecture import architecture_of
from lime_dist.train.optimizers.base import ParameterGroup, Span
from lime_dist.train.optimizers.muon import COEFFICIENTS, ITERATIONS, MOMENTUM, Muon, orthogonal

MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "hyper": ["model.architecture=hyper"],
    "mhc": ["model.architecture=hyper", "model.hyper.connection=doubly_stochastic"],
    "gated": ["model.architecture=gated_residual"],
    "attention residuals": ["model.architecture=attention_residuals"],
    "moda": ["model.lime.depth_attention=moda", "model.lime.mlp_entries=true"],
    "hidden": ["model.lime.routes=hidden", "model.lime.router=dynamic"],
    "chunked": ["model.lime.history={policy: chunked, chunk_size: 1, rank: 1, first: 1}"],
}
SHAPES = {"model.layers.0.self_attn.q_proj.weight": (16, 48), "model.layers.0.mlp.up_proj.weight": (64, 16)}
NORM = "model.norm.weight"


def group_of(parameters: Mapping[str, Tensor], states: tuple[str, ...], **settings: Any) -> ParameterGroup:
    spans, end = {}, 0
    for name, value in parameters.items():
        spans[name] = Span(end, end + value.numel(), tuple(value.shape))
        end += value.numel()
    weight = torch.cat([value.reshape(-1) for value in parameters.values()])
    zeros = {state: torch.zeros_like(weight) for state in states}
    return ParameterGroup("matrices", spans, weight, torch.zeros_like(weight), zeros, **settings)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (8, 8)])
def test_iterations_apply_the_polynomial_to_the_singular_values(shape: tuple[int, ...]) -> None:
    matrix = random(shape, 0, torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    assert torch.allclose(orthogonal(matrix), left @ values.diag() @ right, atol=1e-10)
    assert values.min() > 0.6 and values.max() < 1.25


def test_a_step_equals_torchs_muon_and_adamw() -> None:
    """torch's Muon iterates in bfloat16, ours on a CPU in float32: the updates differ by its rounding."""
    config = load_config(None, ["optimizer.name=muon", "optimizer.weight_decay=0.1"]).optimizer
    ours, values = Muon(config), {name: random(shape, 1) for name, shape in SHAPES.items()}
    norm = {NORM: random((16,), 2)}
    groups = [
        group_of(values, (MOMENTUM,), weight_decay=0.1, lr=0.02),
        group_of(norm, ("exp_avg", "exp_avg_sq"), weight_decay=0.0, lr=0.02),
    ]
    expected = {name: value.clone().requires_grad_() for name, value in {**values, **norm}.items()}
    muon = torch.optim.Muon(
        [expected[name] for name in SHAPES], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([expected[NORM]], lr=0.02, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for step in range(1, 4):
        for group in groups:
            for index, name in enumerate(group.spans):
                gradient = random(group.spans[name].shape, 10 * step + index)
                group.view(group.gradient, name).copy_(gradient)
                expected[name].grad = gradient.clone()
        before = groups[0].weight.clone()
        ours.update(groups, step, torch.zeros(()))
        muon.step()
        adamw.step()
        for name in SHAPES:
            moved = groups[0].view(groups[0].weight, name) - groups[0].view(before, name)
            difference = groups[0].view(groups[0].weight, name) - expected[name].detach()
            assert difference.norm() < 0.03 * step * moved.norm()
        assert torch.allclose(groups[1].weight, expected[NORM].detach(), atol=1e-7)


def test_the_size_of_an_update_does_not_depend_on_the_shape() -> None:
    """The root mean square of its elements is about 0.2 times the learning rate, as AdamW's."""
    config = load_config(None, ["optimizer.name=muon"]).optimizer
    for shape in ((64, 64), (64, 256), (256, 64)):
        group = group_of(
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(shape)}, (MOMENTUM,), weight_decay=0.0, lr=1.0
        )
        group.gradient.copy_(random(shape, 3).reshape(-1))
        Muon(config).update([group], 1, torch.zeros(()))
        assert group.weight.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_which_parameters_are_matrices(name: str) -> None:
    """In every architecture: the projections of attention and MLP, all of which are matrices."""
    model = load_config(None, ["model.num_hidden_layers=2", "model.tie_word_embeddings=false", *MODELS[name]]).model
    muon, architecture = Muon(load_config(None, ["optimizer.name=muon"]).optimizer), architecture_of(model)
    with torch.device("meta"):
        parameters = dict(build_decoder(model, device="meta").named_parameters())
    chosen = {each for each in parameters if muon.states(each, architecture.parameter_group(each)) == (MOMENTUM,)}
    assert all(parameters[each].dim() == 2 and each.endswith("_proj.weight") for each in chosen)
    assert len(chosen) == 14 + (2 if name == "moda" else 0), "nobody reads the last layer's entries of moda"
    assert not any("embed" in each or "lm_head" in each or "router" in each or "connection" in each for each in chosen)
