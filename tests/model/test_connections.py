"""Protects the constrained kinds of Hyper-Connections: doubly stochastic matrices, special cases, initial values."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from support.models import small
from torch import Tensor

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.model.architecture import architecture_of
from lime_dist.model.architectures.hyper.modules.constrained import InverseRMS
from lime_dist.model.architectures.hyper.modules.permutations import mixture_of_permutations, permutation_matrices
from lime_dist.model.architectures.hyper.modules.sinkhorn import doubly_stochastic
from lime_dist.model.decoder import Decoder

CONSTRAINED = ["doubly_stochastic", "permutations"]
TOKENS = torch.arange(14).view(2, 7)


def hyper(connection: str, rate: int, **changes: object) -> Decoder:
    config = small(architecture="hyper", hyper={"connection": connection, "rate": rate}, **changes)
    return build_decoder(config, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matrices_are_doubly_stochastic(dtype: torch.dtype) -> None:
    """Sinkhorn's after 20 rounds to 1e-5, from weights with standard deviation 0.7 (with 1, the worst of 500 is 2e-5 off); mixtures of
    permutations as exactly as the type allows."""
    exact = 8 * torch.finfo(dtype).eps
    for matrices, allowed in (
        (doubly_stochastic(0.7 * random(500, 16).to(dtype), 4), 1e-5),
        (mixture_of_permutations(100 * random(500, 24).to(dtype), 4), exact),
    ):
        assert matrices.min() >= 0 and matrices.dtype == dtype
        for dimension in (-1, -2):
            assert (matrices.sum(dimension) - 1).abs().max() <= allowed


def test_large_weights_do_not_overflow() -> None:
    """The rows of Sinkhorn's matrix have not converged then, but its columns are exact, and its gradient is finite."""
    logits = (1e4 * random(20, 16)).float().requires_grad_()
    matrix = doubly_stochastic(logits, 4)
    (matrix * random(20, 4, 4).float()).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (matrix.sum(-2) - 1).abs().max() < 1e-5


def test_gradients_are_those_of_finite_differences() -> None:
    torch.autograd.gradcheck(lambda logits: doubly_stochastic(logits, 3), random(4, 9).requires_grad_())
    torch.autograd.gradcheck(lambda x: InverseRMS.apply(x, 1e-3), random(3, 5).requires_grad_())


def test_sinkhorns_iterations_are_not_kept() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        doubly_stochastic(random(5, 16).requires_grad_(), 4)
    assert [tensor.numel() for tensor in kept] == [5 * 16]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_permutations_in_order(size: int) -> None:
    matrices = permutation_matrices(size, torch.float64, torch.device("cpu")).view(-1, size, size)
    assert [tuple(matrix.argmax(-1).tolist()) for matrix in matrices] == list(permutations(range(size)))
    assert matrices.sum() == len(matrices) * size


@pytest.mark.parametrize("connection", CONSTRAINED)
def test_one_stream_is_the_plain_residual(connection: str) -> None:
    """With H_pre = H_post = 1: σ(40) is 1 in float64, and 2σ(0) is 1. The matrix of one stream is 1, whatever its weight."""
    model, llama = hyper(connection, 1), build_decoder(small(architecture="llama"), dtype=torch.float64)
    for name, parameter in llama.named_parameters():
        perturb(name, parameter)
        model.get_parameter(name).data.copy_(parameter)
    for name, parameter in model.named_parameters():
        if name.endswith("static_bias"):
            parameter.data.copy_(torch.tensor([40.0, 0, 3]))
        elif name.endswith("mapping_proj.weight"):
            parameter.data.zero_()
    torch.testing.assert_close(model(TOKENS), llama(TOKENS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("connection", CONSTRAINED)
def test_initial_matrices(connection: str) -> None:
    """mHC averages the streams, up to the small part that depends on the token; mHC-lite leaves them alone."""
    module = hyper(connection, 4).model.layers[5].mlp_connection
    streams = random(2, 3, 4, 24)
    matrix, factors = module.weights(streams)
    pre, residual = matrix[..., 0, :], matrix[..., 1:, :]
    wanted = {
        "doubly_stochastic": (torch.full((4,), 0.5), torch.ones(4), torch.full((4, 4), 0.25), 5e-3),
        "permutations": (
            torch.tensor([-1.0, 1, -1, -1]).sigmoid(), 2 * torch.tensor([-1.0, 1, -1, -1]).sigmoid(), torch.eye(4), 1e-2,
        ),
    }[connection]  # fmt: skip
    for value, expected in zip((pre, factors, residual), wanted, strict=False):
        torch.testing.assert_close(value, expected.double().expand_as(value), rtol=0, atol=wanted[3])


def test_groups() -> None:
    model = hyper("doubly_stochastic", 2)
    groups = {name: architecture_of(model.config).parameter_group(name) for name, _ in model.named_parameters()}
    own = {
        name.rpartition("attn_connection.")[2]: group for name, group in groups.items() if "layers.1.attn_con" in name
    }
    assert own == {"mapping_proj.weight": "matrices", "static_bias": "plain", "scales": "plain"}
    assert groups["model.layers.1.input_layernorm.weight"] == "plain"
