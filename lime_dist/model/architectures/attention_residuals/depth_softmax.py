"""The softmax over depth: scores, mixtures and their gradients, for a slice of tokens at a time.

E entries (outputs of finished blocks), R readers (sub-layers), N tokens, n of a slice, D hidden size. A reader's score of entry v is
wᵀ·RMSNorm(v) = (w ⊙ γ)·v / rms(v) = q·v / rms(v), so no key is stored: only the query q and 1 / rms(v).

For the weights a = softmax(s) and a mixture h = Σ a_e·v_e with the gradient g: ∂s_e = a_e (g·v_e − g·h), and
∂v_e = a_e·g + ∂s_e·(q / rms(v_e) − s_e·v_e / (D·rms²(v_e))). The last term is the same for all readers up to a factor, so
their ∂s_e·s_e are summed, and it is applied once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lime_dist.model.architectures.attention_residuals.architecture import SLICE_ELEMENTS_GPU, SLICE_TOKENS
from lime_dist.model.products import mixed_product

SLICE_ELEMENTS = 1 << 19
"""Elements of entries [E, n, D] that are read at a time on a CPU, where they fit a cache."""


def inverse_rms(x_ND: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + ε), [N], in at least float32."""
    accumulation_dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.to(accumulation_dtype).square().mean(-1).add_(eps).rsqrt_()


def mix(entries_END: Tensor, inverse_EN: Tensor, queries_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Mixtures [R, N, D] and the logarithms of the sums of exponentials of their scores [R, N], in at least float32."""
    _, num_tokens, size = entries_END.shape
    mixtures_RND = queries_RD.new_empty(len(queries_RD), num_tokens, size)
    sums_RN = queries_RD.new_empty(len(queries_RD), num_tokens)
    for tokens in _token_slices(entries_END):
        factor_EnD = _factor(entries_END[:, tokens])
        scores_EnR = _scores(factor_EnD, inverse_EN[:, tokens], queries_RD)
        sums_nR = scores_EnR.logsumexp(0)
        weights_nRE = scores_EnR.sub_(sums_nR).exp_().permute(1, 2, 0)
        mixtures_RND[:, tokens] = mixed_product(weights_nRE, factor_EnD.transpose(0, 1), queries_RD.dtype).transpose(
            0, 1
        )
        sums_RN[:, tokens] = sums_nR.t()
    return mixtures_RND, sums_RN


def total_weights(entries_END: Tensor, inverse_EN: Tensor, queries_RD: Tensor, sums_RN: Tensor) -> Tensor:
    """Weights of entries, summed over tokens, [R, E], given the logarithms of the sums of exponentials of all scores."""
    total_RE = queries_RD.new_zeros(len(queries_RD), len(entries_END))
    for tokens in _token_slices(entries_END):
        scores_EnR = _scores(_factor(entries_END[:, tokens]), inverse_EN[:, tokens], queries_RD)
        total_RE += scores_EnR.sub_(sums_RN[:, tokens].t()).exp_().sum(1).t()
    return total_RE


def spread(
    entries_END: Tensor,
    inverse_EN: Tensor,
    queries_RD: Tensor,
    sums_RN: Tensor,
    gradient_RND: Tensor,
    products_RN: Tensor,
    gradients_END: Tensor,
    score_products_EN: Tensor,
    query_gradients_RD: Tensor,
) -> None:
    """The backward of what readers read of entries, given the whole of their reads.

    Args:
        sums_RN: logarithms of the sums of exponentials of all scores of the readers.
        gradient_RND: of the readers' mixtures.
        products_RN: gradient · mixture.
        gradients_END: without the last term of ∂v_e; added to, as are the next two.
        score_products_EN: the sum of ∂s_e·s_e.
        query_gradients_RD: of the queries.
    """
    dtype = queries_RD.dtype
    queries_ERD = queries_RD.expand(len(entries_END), -1, -1)
    for tokens in _token_slices(entries_END):
        factor_EnD, inverse_En1 = _factor(entries_END[:, tokens]), inverse_EN[:, tokens].unsqueeze(-1)
        gradient_nRD = gradient_RND[:, tokens].transpose(0, 1)
        scores_EnR = _scores(factor_EnD, inverse_EN[:, tokens], queries_RD)
        weights_EnR = (scores_EnR - sums_RN[:, tokens].t()).exp_()
        projected_nER = mixed_product(factor_EnD.transpose(0, 1), gradient_nRD.transpose(1, 2), dtype)
        score_gradients_EnR = (projected_nER.transpose(0, 1) - products_RN[:, tokens].t()).mul_(weights_EnR)
        score_products_EN[:, tokens] += (score_gradients_EnR * scores_EnR).sum(-1)
        score_gradients_EnR.mul_(inverse_En1)
        target_EnD = gradients_END[:, tokens]
        target_EnD += mixed_product(weights_EnR.transpose(0, 1), gradient_nRD, dtype).transpose(0, 1)
        target_EnD += mixed_product(score_gradients_EnR, queries_ERD, dtype)
        query_gradients_RD += mixed_product(score_gradients_EnR.transpose(1, 2), factor_EnD, dtype).sum(0)


def _scores(factor_EnD: Tensor, inverse_En: Tensor, queries_RD: Tensor) -> Tensor:
    """q·v / rms(v), [E, n, R]."""
    queries_EDR = queries_RD.t().expand(len(factor_EnD), -1, -1)
    return mixed_product(factor_EnD, queries_EDR, queries_RD.dtype).mul_(inverse_En.unsqueeze(-1))


def _factor(entries_EnD: Tensor) -> Tensor:
    """The entries as a factor of products: on a CPU in at least float32, elsewhere in their own precision."""
    if entries_EnD.device.type != "cpu":
        return entries_EnD
    return entries_EnD.to(torch.promote_types(entries_EnD.dtype, torch.float32))


def _token_slices(entries_END: Tensor) -> Iterator[slice]:
    """The N tokens of the entries, in slices of about ``SLICE_ELEMENTS`` elements."""
    num_entries, num_tokens, size = entries_END.shape
    elements = SLICE_ELEMENTS if entries_END.device.type == "cpu" else SLICE_ELEMENTS_GPU
    step = max(SLICE_TOKENS, elements // (num_entries * size))
    for begin in range(0, num_tokens, step):
        yield slice(begin, min(begin + step, num_tokens))
