"""Causal attention over the sequence, with the logarithms of its sums of exponentials: the kernels of
``scaled_dot_product_attention``, which keeps these to itself.

With further keys in the same softmax, only the normaliser differs: the gradients of the sequence's part follow from the output and
the logarithms of the whole softmax. So `gradients` takes these, and no kernel has to know of the other keys.

Shapes: B batch, T tokens, H query heads, G K/V heads, d head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

WINDOW = 256
"""Queries whose scores exist at the same time where torch has no kernel."""
EFFICIENT_MULTIPLE = 32
"""The memory-efficient kernel pads logarithms to a multiple of this."""
BIAS_MULTIPLE = 16
"""It wants rows of a mask to begin at multiples of this."""


class Attended(NamedTuple):
    """What `attend` returns.

    Attributes:
        out_BHTd: the output.
        sums_BHT: logarithms of the sums of exponentials, in at least float32.
        state: what the kernel's backward needs beside them.
    """

    out_BHTd: Tensor
    sums_BHT: Tensor
    state: tuple[Any, ...] = ()


def attend(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None = None) -> Attended:
    """Causal attention with scores q·k / √d; K/V head g serves the H/G query heads from g·H/G on.

    Args:
        mask: added to the scores, [B, 1, T, T]; None: a query reads all keys up to its own.
    """
    is_causal = mask is None
    if q_BHTd.device.type == "cpu":
        attend_on_cpu = aten._scaled_dot_product_flash_attention_for_cpu
        return Attended(*attend_on_cpu(q_BHTd, k_BGTd, v_BGTd, 0.0, is_causal, attn_mask=mask))
    if is_causal and _has_flash(q_BHTd):
        out, sums, *state = aten._scaled_dot_product_flash_attention(q_BHTd, k_BGTd, v_BGTd, 0.0, True)
        return Attended(out, sums, tuple(state[:6]))
    if _has_efficient(q_BHTd):
        key, value = _every_head(q_BHTd, k_BGTd), _every_head(q_BHTd, v_BGTd)
        out, sums, *state = aten._scaled_dot_product_efficient_attention(
            q_BHTd, key, value, _bias(q_BHTd, mask), True, 0.0, is_causal
        )
        return Attended(out, sums[..., : q_BHTd.shape[2]], tuple(state))
    return _plain(q_BHTd, k_BGTd, v_BGTd, mask)


def gradients(
    gradient_BHTd: Tensor,
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    attended: Attended,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given that of the whole output.

    Args:
        attended: output and logarithms of the whole softmax, which may have had more keys.
    """
    out, sums, state = attended
    factors, is_causal = (gradient_BHTd, q_BHTd, k_BGTd, v_BGTd), mask is None
    if q_BHTd.device.type == "cpu":
        cpu: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *factors, out, sums, 0.0, is_causal, attn_mask=mask
        )
        return cpu
    if is_causal and _has_flash(q_BHTd):
        *sequences, seed, offset = state
        flash: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
            *factors, out, sums.contiguous(), *sequences, 0.0, True, seed, offset
        )
        return flash
    if _has_efficient(q_BHTd):
        key, value = _every_head(q_BHTd, k_BGTd), _every_head(q_BHTd, v_BGTd)
        padded = F.pad(sums, (0, -sums.shape[-1] % EFFICIENT_MULTIPLE), value=torch.inf)
        wanted, bias = [True, True, True, False], _bias(q_BHTd, mask)
        query_gradient, *others, _ = aten._scaled_dot_product_efficient_attention_backward(
            gradient_BHTd, q_BHTd, key, value, bias, out, padded, *state, 0.0, wanted, is_causal
        )
        key_gradient, value_gradient = (one.unflatten(1, (k_BGTd.shape[1], -1)).sum(2) for one in others)
        return query_gradient, key_gradient, value_gradient
    return _plain_gradients(*factors, out, sums, mask)


def _has_flash(q_BHTd: Tensor) -> bool:
    """Whether CUDA's flash attention takes such queries."""
    return q_BHTd.dtype.itemsize == 2 and q_BHTd.shape[-1] % 8 == 0 and q_BHTd.shape[-1] <= 256


def _has_efficient(q_BHTd: Tensor) -> bool:
    """Whether CUDA's memory-efficient attention takes such queries."""
    return q_BHTd.dtype != torch.float64 and q_BHTd.shape[-1] % 8 == 0


def _bias(q_BHTd: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask for every head, whose rows begin at the multiples of elements that memory-efficient attention needs."""
    if mask is None:
        return None
    aligned = F.pad(mask, (0, -mask.shape[-1] % BIAS_MULTIPLE))[..., : mask.shape[-1]]
    return aligned.expand(-1, q_BHTd.shape[1], -1, -1)


def _every_head(q_BHTd: Tensor, x_BGTd: Tensor) -> Tensor:
    """K/V heads, each as often as query heads share it."""
    repeats = q_BHTd.shape[1] // x_BGTd.shape[1]
    return x_BGTd if repeats == 1 else x_BGTd.repeat_interleave(repeats, 1)


# -- where torch has no kernel: a window of queries at a time --------------------------------------------------------------


def _plain(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None = None) -> Attended:
    dtype = torch.promote_types(q_BHTd.dtype, torch.float32)
    key, value = k_BGTd.to(dtype), v_BGTd.to(dtype)
    outs, sums = [], []
    for window in _windows(q_BHTd):
        scores = _scores(q_BHTd, key, window, mask)
        sums.append(scores.logsumexp(-1))
        shares = (scores - sums[-1].unsqueeze(-1)).exp_()
        outs.append((shares.flatten(2, 3) @ value[:, :, : window.stop]).unflatten(2, shares.shape[2:4]))
    out, total = torch.cat(outs, 3), torch.cat(sums, 3)
    return Attended(out.flatten(1, 2).to(q_BHTd.dtype), total.flatten(1, 2))


def _plain_gradients(
    gradient_BHTd: Tensor,
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    out_BHTd: Tensor,
    sums_BHT: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = sums_BHT.dtype, (k_BGTd.shape[1], -1)
    key, value = k_BGTd.to(dtype), v_BGTd.to(dtype)
    query_gradients, key_gradient, value_gradient = [], torch.zeros_like(key), torch.zeros_like(value)
    for window in _windows(q_BHTd):
        rows, past = (slice(None), slice(None), window), slice(window.stop)
        gradient, query, out = (x[rows].to(dtype).unflatten(1, groups) for x in (gradient_BHTd, q_BHTd, out_BHTd))
        shares = (_scores(q_BHTd, key, window, mask) - sums_BHT[rows].unflatten(1, groups).unsqueeze(-1)).exp_()
        flat = gradient.flatten(2, 3)
        value_gradient[:, :, past] += shares.flatten(2, 3).mT @ flat
        score_gradients = (flat @ value[:, :, past].mT).view_as(shares)
        score_gradients = (score_gradients - (gradient * out).sum(-1, keepdim=True)).mul_(shares)
        score_gradients = score_gradients.mul_(q_BHTd.shape[-1] ** -0.5).flatten(2, 3)
        key_gradient[:, :, past] += score_gradients.mT @ query.flatten(2, 3)
        query_gradients.append((score_gradients @ key[:, :, past]).view_as(query))
    query_gradient = torch.cat(query_gradients, 3).flatten(1, 2)
    return query_gradient.to(q_BHTd.dtype), key_gradient.to(k_BGTd.dtype), value_gradient.to(v_BGTd.dtype)


def _windows(q_BHTd: Tensor) -> list[slice]:
    length = q_BHTd.shape[2]
    return [slice(begin, min(begin + WINDOW, length)) for begin in range(0, length, WINDOW)]


def _scores(q_BHTd: Tensor, k_BGTd: Tensor, window: slice, mask: Tensor | None) -> Tensor:
    """Scores of a window of queries and of all keys up to its last one, [B, G, H/G, queries, keys]."""
    query = q_BHTd[:, :, window].to(k_BGTd.dtype).unflatten(1, (k_BGTd.shape[1], -1))
    scores = (query.flatten(2, 3) @ k_BGTd[:, :, : window.stop].mT).unflatten(2, query.shape[2:4])
    scores.mul_(q_BHTd.shape[-1] ** -0.5)
    if mask is not None:
        return scores.add_(mask[:, :, window, : window.stop].unsqueeze(1))
    position = torch.arange(window.stop, device=q_BHTd.device)
    return scores.masked_fill_(position > position[window].unsqueeze(-1), -torch.inf)
