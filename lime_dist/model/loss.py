"""Output projection and cross-entropy together, for a piece of the tokens at a time: the logits [N, V] never exist as a whole.

The forward pass also computes the gradients, while it has a piece's logits at hand, and keeps those of the hidden states and of the
weight for the backward pass. `language_model_loss` computes the same loss from all logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.model.cost import loss_piece_tokens
from lime_dist.model.logits import PLAIN, LogitForm
from lime_dist.model.products import add_product


def projected_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    counted_share: float | None = None,
    form: LogitForm = PLAIN,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats per token of logits made from the products hidden · weightᵀ, and the z-loss, computed in at least
    float32.

    Args:
        hidden_BTD: hidden states after the last norm.
        weight_VD: of the output projection; of the embedding if that is tied.
        counted_share: see `language_model_loss`.
        form: of the logits.
        z_loss: ``train.z_loss``.
    """
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    count = (labels_N != IGNORED_LABEL).sum() if counted_share is None else labels_N.numel() * counted_share
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _ProjectedLoss.apply(hidden_ND, weight_VD, labels_N, count, form, z_loss)
    return _sum_of_losses(hidden_ND, weight_VD, labels_N, form, z_loss) / count


class _ProjectedLoss(torch.autograd.Function):
    """Keeps the gradients of the hidden states, in their type, and of the weight, in at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        count: Tensor | float,
        form: LogitForm,
        z_loss: float,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        gradients = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=dtype)
        scale_N = (labels_N != IGNORED_LABEL).to(dtype).div_(count)
        total = _sum_of_losses(hidden_ND, weight_VD, labels_N, form, z_loss, scale_N, gradients)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight_VD.dtype
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden_ND, weight_VD = ctx.saved_tensors
        scaled = torch.empty_like(weight_VD, dtype=ctx.weight_dtype)
        torch.mul(weight_VD, gradients[0], out=scaled)
        return hidden_ND * gradients[0], scaled, None, None, None, None


def _sum_of_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    form: LogitForm,
    z_loss: float,
    scale_N: Tensor | None = None,
    gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The sum of the tokens' losses.

    Args:
        scale_N: factors of the tokens' losses in the gradients; 0 for labels that do not count.
        gradients: of ``hidden_ND``, set here, and of ``weight_VD``, added to here.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
    size = loss_piece_tokens(len(weight_VD), len(labels_N))
    for begin in range(0, len(labels_N), size):
        piece = slice(begin, begin + size)
        states, labels = hidden_ND[piece], labels_N[piece]
        logits = form.logits_(_products(states, weight_VD, dtype))
        log_shares = logits.log_softmax(-1)
        total += F.nll_loss(log_shares, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        if z_loss:
            log_sums = logits.logsumexp(-1)
            total += z_loss * (log_sums.square() * (labels != IGNORED_LABEL)).sum()
        bounded = logits if form.softcap is not None else None
        del logits
        if gradients is None or scale_N is None:
            continue
        hidden_gradient_ND, weight_gradient_VD = gradients
        # ∂loss/∂logits = softmax − 1 at the label, times the token's factor; that of the z-loss is 2w · log Σ · softmax
        shares, chosen = log_shares.exp_(), labels.clamp(min=0).unsqueeze(-1)
        if z_loss:
            shares.mul_((1 + 2 * z_loss * log_sums).unsqueeze(-1))
        shares.scatter_add_(-1, chosen, shares.new_full((), -1.0).expand(chosen.shape))
        shares.mul_(scale_N[piece].unsqueeze(-1))
        product_gradient = form.product_gradient_(bounded, shares).to(states.dtype)
        del log_shares, shares, bounded
        torch.mm(product_gradient, weight_VD, out=hidden_gradient_ND[piece])
        add_product(product_gradient.t(), states, weight_gradient_VD)
    return total


def _products(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden · weightᵀ, [N, V], in ``dtype``. On a GPU they are not rounded to the type of the factors."""
    if hidden_ND.device.type != "cpu" and hidden_ND.dtype != dtype:
        return torch.mm(hidden_ND, weight_VD.t(), out_dtype=dtype)
    return F.linear(hidden_ND, weight_VD).to(dtype)
