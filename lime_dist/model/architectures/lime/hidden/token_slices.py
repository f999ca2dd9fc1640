"""What a layer of ``routes: hidden`` reads alone, mixed for a slice of tokens at a time so that a mixture stays small.

E entries read, H heads, n tokens of the slice, D hidden size. Weights are static, [H, columns], or dynamic, [N, H, columns].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lime_dist.model.architectures.lime.hidden.architecture import SLICE_ELEMENTS_GPU, SLICE_TOKENS
from lime_dist.model.products import add_product, batched_product, product_of_rows

SLICE_ELEMENTS = 1 << 19
"""Elements of a mixture [H, n, D] that are computed at a time on a CPU, where they fit a cache. On a GPU it is
`SLICE_ELEMENTS_GPU`."""

Parts = list[tuple[slice, slice]]
"""Columns of a reader's weights, and the positions that they weigh."""


def token_slices(entries_END: Tensor, num_heads: int) -> Iterator[slice]:
    """The N tokens of the entries, in slices for which a mixture has about ``SLICE_ELEMENTS`` elements."""
    _, num_tokens, size = entries_END.shape
    elements = SLICE_ELEMENTS if entries_END.device.type == "cpu" else SLICE_ELEMENTS_GPU
    step = max(SLICE_TOKENS, elements // (num_heads * size))
    for begin in range(0, num_tokens, step):
        yield slice(begin, min(begin + step, num_tokens))


def mix_slice(entries_END: Tensor, weights: Tensor, parts: Parts, tokens: slice, older_HND: Tensor | None) -> Tensor:
    """The mixture [H, n, D] for one slice of tokens: what the block read from older entries plus what the layer reads alone."""
    size = entries_END.shape[-1]
    mixed_HX = None if older_HND is None else older_HND[:, tokens].flatten(1)  # X = n·D
    if weights.dim() == 2:
        for columns, run in parts:
            states_EX = entries_END[run, tokens].flatten(1)
            if mixed_HX is None:
                mixed_HX = weights[:, columns] @ states_EX
            elif older_HND is None:
                mixed_HX.addmm_(weights[:, columns], states_EX)
            else:  # a new tensor, since the block keeps its mixture
                mixed_HX, older_HND = torch.addmm(mixed_HX, weights[:, columns], states_EX), None
        assert mixed_HX is not None
        return mixed_HX.view(len(weights), -1, size)
    mixed_HnD: Tensor | None = None
    for columns, run in parts:
        part = torch.bmm(weights[tokens, :, columns], entries_END[run, tokens].transpose(0, 1)).transpose(0, 1)
        mixed_HnD = part if mixed_HnD is None else mixed_HnD + part
    assert mixed_HnD is not None
    return mixed_HnD


def spread_slice(
    entries_END: Tensor,
    gradients_END: Tensor,
    weights: Tensor,
    weight_gradient: Tensor,
    parts: Parts,
    tokens: slice,
    gradient_HnD: Tensor,
) -> None:
    """The backward of what `mix_slice` reads from ``parts``: add to the gradients of the entries and of the weights, in the
    precision of ``gradients_END``.

    Args:
        gradient_HnD: the gradient of the slice's mixture.
    """
    dtype = gradients_END.dtype
    for columns, run in parts:
        states_EnD, target_EnD = entries_END[run, tokens], gradients_END[run, tokens]
        if weights.dim() == 2:
            flat = gradient_HnD.flatten(1)
            weight_gradient[:, columns] += product_of_rows(flat, states_EnD.flatten(1))
            add_product(weights[:, columns].t(), flat, target_EnD.view(len(target_EnD), -1))
        else:
            gradient_nHD = gradient_HnD.transpose(0, 1)
            weights_nEH = weights[tokens, :, columns].transpose(1, 2)
            weight_gradient[tokens, :, columns] = torch.bmm(gradient_nHD, states_EnD.permute(1, 2, 0))
            target_EnD += batched_product(weights_nEH, gradient_nHD, dtype).transpose(0, 1)
