"""Protects the loss in pieces, norm and rotation: the values and gradients of the plain formulas, without their memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lime_dist.config.schema import RopeScalingConfig
from lime_dist.model import cost
from lime_dist.model.layers import Positions, language_model_loss, rotary_table, rotate
from lime_dist.model.logits import PLAIN, LogitForm
from lime_dist.model.loss import projected_loss
from lime_dist.model.norm_rotation import rms_norm

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
TOKENS, VOCABULARY, HIDDEN = (3, 50), 37, 16


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and labels, a third of which do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        (torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_()
        for shape in (TOKENS, (VOCABULARY,))
    )
    labels = torch.randint(VOCABULARY, TOKENS, generator=generator)
    labels[0] = -100
    return hidden, weight, labels


FORMS = {
    "plain": (PLAIN, 0.0),
    "z-loss": (PLAIN, 0.1),
    "bounded": (LogitForm(softcap=1.5), 0.0),
    "all": (LogitForm(0.5, 0.7), 0.1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("piece", [64, 10**9], ids=["pieces", "whole"])
@pytest.mark.parametrize("counted_share", [None, 0.5])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_loss_in_pieces_equals_the_loss_of_all_logits(
    dtype: torch.dtype, counted_share: float | None, piece: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound and a scale of the logits and the z-loss, too."""
    logit_form, z_loss = FORMS[form]
    monkeypatch.setattr(cost, "LOGITS_OF_A_PIECE", piece * VOCABULARY)
    monkeypatch.setattr(cost, "PIECE_UNIT", 8)
    hidden, weight, labels = inputs(dtype)
    products = F.linear(hidden, weight)
    products = products if dtype == torch.float64 else products.float()
    wanted = language_model_loss(logit_form.logits(products), labels, counted_share, z_loss)
    loss = projected_loss(hidden, weight, labels, counted_share, logit_form, z_loss)
    assert loss.dtype == wanted.dtype
    torch.testing.assert_close(loss, wanted, rtol=TOLERANCES[dtype] / 10, atol=0)
    with torch.no_grad():
        assert torch.equal(projected_loss(hidden, weight, labels, counted_share, logit_form, z_loss), loss)
    for own, theirs in zip(
        torch.autograd.grad(loss / 3, (hidden, weight)), torch.autograd.grad(wanted / 3, (hidden, weight)), strict=True
    ):
        assert own.dtype == dtype
        assert (own - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]  # torch types it so
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("with_gradients", [True, False])
def test_all_logits_never_exist_together(with_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LOGITS_OF_A_PIECE", 64 * VOCABULARY)
    monkeypatch.setattr(cost, "PIECE_UNIT", 8)
    hidden, weight, labels = inputs(torch.float32)
    assert 8 <= cost.loss_piece_tokens(VOCABULARY, labels.numel()) <= 64
    with LargestTensor() as largest, torch.set_grad_enabled(with_gradients):
        loss = projected_loss(hidden, weight, labels, form=LogitForm(0.5, 2.0), z_loss=0.1)
        if with_gradients:
            loss.backward()
    assert largest.elements <= max(64 * VOCABULARY, hidden.numel()) < labels.numel() * VOCABULARY


@pytest.mark.parametrize("tokens", [1, 100, 8192, 10**6])
def test_pieces(tokens: int) -> None:
    size = cost.loss_piece_tokens(50304, tokens)
    assert 1 <= size <= tokens and (size == tokens or size % 128 == 0)
    assert size * 50304 <= cost.LOGITS_OF_A_PIECE + 128 * 50304


@pytest.mark.parametrize("weighted", [True, False])
def test_norm_and_rotation_have_the_right_gradients(weighted: bool) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True) if weighted else None
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x, *weights: rms_norm(x, *(weights or (None,)), 1e-5), (x, weight) if weighted else (x,)
    )
    table = rotary_table(3, 8, 10000.0, RopeScalingConfig(), torch.float64, torch.device("cpu"))
    cos, sin = table
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    torch.testing.assert_close(rotate(x, Positions(*table)), x * cos + turned * sin, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: rotate(x, Positions(*table)), (x,))


def test_a_bf16_norm_is_rounded_once() -> None:
    """Rounding before the weight, too, made an error 1.4 times as large (root mean square)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((500, 64), (64,)))
    exact = F.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    error = (rms_norm(x, weight, 1e-5).double() - exact).square().mean().sqrt()
    rounding = (exact.bfloat16().double() - exact).square().mean().sqrt()
    assert error < 1.01 * rounding
