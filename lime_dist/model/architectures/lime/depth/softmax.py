"""The part of earlier layers in the softmax of attention, and its gradients, for a slice of tokens at a time.

N tokens, n of a slice, G K/V heads, R query heads of each, C pairs of a key and a value (columns), d head size. `mix` merges the
columns into attention over the sequence as in the online softmax: with the logarithms s and t of their sums of exponentials,
outputs a and b are together (eˢ·a + eᵗ·b) / (eˢ + eᵗ).

For the shares p = softmax(z) of scores z = q·k / √d and an output o with the gradient g: ∂z = p (g·v − g·o), ∂q = Σ ∂z·k / √d,
∂k = Σ ∂z·q / √d and ∂v = Σ p·g, the last two over the readers of the key. Those that several readers have in common wait for all
of them (`Together`): their gradients are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lime_dist.model.architectures.lime.depth.architecture import SLICE_ELEMENTS_GPU, SLICE_TOKENS
from lime_dist.model.products import mixed_product

SLICE_ELEMENTS = 1 << 19
"""Elements of keys [C, n, G, d] that are read at a time on a CPU, where they fit a cache."""


def mix(pairs: Sequence[Tensor], q_NGRd: Tensor, out_NGRd: Tensor, sums_NGR: Tensor) -> None:
    """Merge columns into attention over the sequence.

    Args:
        pairs: parts of the columns, [C, 2, N, G, d] each.
        out_NGRd, sums_NGR: output over the sequence and the logarithms of its sums of exponentials, which change in place.
    """
    for tokens in _token_slices(pairs):
        parts = [_factors(part, tokens) for part in pairs]
        scores = _scores(q_NGRd[tokens], parts, sums_NGR.dtype)
        before = sums_NGR[tokens].flatten(0, 1)
        after = torch.logaddexp(before, scores.logsumexp(-1))
        mixed = out_NGRd[tokens].flatten(0, 1) * (before - after).exp_().unsqueeze(-1)
        shares = scores.sub_(after.unsqueeze(-1)).exp_().split([len(part) for part in pairs], -1)
        for share, (_, values) in zip(shares, parts, strict=True):
            mixed += mixed_product(share, values, mixed.dtype)
        out_NGRd[tokens] = mixed.view_as(out_NGRd[tokens])
        sums_NGR[tokens] = after.view_as(sums_NGR[tokens])


def total_shares(pairs: Sequence[Tensor], q_NGRd: Tensor, sums_NGR: Tensor) -> Tensor:
    """Shares of columns, summed over tokens, [G·R, C], given the logarithms of the sums of exponentials of the whole softmax."""
    total = sums_NGR.new_zeros(*sums_NGR.shape[1:], sum(len(part) for part in pairs))
    for tokens in _token_slices(pairs):
        scores = _scores(q_NGRd[tokens], [_factors(part, tokens) for part in pairs], sums_NGR.dtype)
        scores.sub_(sums_NGR[tokens].flatten(0, 1).unsqueeze(-1))
        total += scores.exp_().view(-1, *total.shape).sum(0)
    return total.flatten(0, 1)


class Together:
    """What a block of readers adds to the gradients of columns that all of them read.

    Args:
        readers: number of readers.
        columns: number of columns.
    """

    def __init__(self, readers: int, columns: int, q_NGRd: Tensor) -> None:
        tokens, groups, heads, size = q_NGRd.shape
        self._queries, self._gradients = (q_NGRd.new_empty(tokens, groups, readers, heads, size) for _ in range(2))
        self.shares, self.score_gradients = (
            q_NGRd.new_empty(tokens, groups, readers, heads, columns) for _ in range(2)
        )

    def take(self, reader: int, q_NGRd: Tensor, gradient_NGRd: Tensor) -> None:
        """Keep a reader's queries and the gradient of its output. `spread` has filled its shares and the gradients of its scores."""
        self._queries[:, :, reader], self._gradients[:, :, reader] = q_NGRd, gradient_NGRd

    def spread(self, targets: Sequence[Tensor]) -> None:
        """Add to the gradients of the columns, [C, 2, N, G, d] each, once all readers have been taken."""
        for tokens in _token_slices(targets):
            queries, gradients, shares, scores = (
                x[tokens].flatten(2, 3).flatten(0, 1)
                for x in (self._queries, self._gradients, self.shares, self.score_gradients)
            )
            _add(targets, tokens, shares, scores, queries, gradients)


def spread(
    pairs: Sequence[Tensor],
    targets: Sequence[Tensor],
    q_NGRd: Tensor,
    sums_NGR: Tensor,
    gradient_NGRd: Tensor,
    products_NGR: Tensor,
    query_gradient_NGRd: Tensor,
    together: tuple[Together, int] | None = None,
) -> None:
    """Add what a reader gives to the gradients of columns and of its queries.

    Args:
        targets: the gradients of the columns of ``pairs``.
        sums_NGR: logarithms of the sums of exponentials of all scores.
        gradient_NGRd: of the reader's output.
        products_NGR: gradient · output.
        together: if columns wait for other readers, where they do, and the number of this reader; ``targets`` stay as they are.
    """
    dtype, scale = sums_NGR.dtype, q_NGRd.shape[-1] ** -0.5
    for tokens in _token_slices(pairs):
        parts = [_factors(part, tokens) for part in pairs]
        query, gradient = q_NGRd[tokens].flatten(0, 1), gradient_NGRd[tokens].flatten(0, 1)
        scores = _scores(q_NGRd[tokens], parts, dtype)
        shares = scores.sub_(sums_NGR[tokens].flatten(0, 1).unsqueeze(-1)).exp_()
        projected = torch.cat([mixed_product(gradient, values.mT, dtype) for _, values in parts], -1)
        score_gradients = projected.sub_(products_NGR[tokens].flatten(0, 1).unsqueeze(-1)).mul_(shares).mul_(scale)
        total = query_gradient_NGRd[tokens].flatten(0, 1).to(dtype)
        for one, (keys, _) in zip(score_gradients.split([len(part) for part in pairs], -1), parts, strict=True):
            total = total + mixed_product(one, keys, dtype)
        query_gradient_NGRd[tokens] = total.view_as(query_gradient_NGRd[tokens])
        if together is None:
            _add(targets, tokens, shares, score_gradients, query, gradient)
        else:
            whole, reader = together
            for kept, own in ((whole.shares, shares), (whole.score_gradients, score_gradients)):
                kept[tokens, :, reader] = own.view_as(kept[tokens, :, reader])


def _add(
    targets: Sequence[Tensor], tokens: slice, shares: Tensor, score_gradients: Tensor, query: Tensor, gradient: Tensor
) -> None:
    """Add to the gradients of keys and values, from shares and gradients of scores [n·G, readers, C], and queries and gradients of
    outputs [n·G, readers, d]."""
    begin = 0
    for target in targets:
        columns = slice(begin, begin + len(target))
        for index, weights, factor in ((0, score_gradients, query), (1, shares, gradient)):
            place = target[:, index, tokens].flatten(1, 2)
            place += mixed_product(weights[..., columns].mT, factor, target.dtype).transpose(0, 1)
        begin = columns.stop


def _scores(q_nGRd: Tensor, parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """q·k / √d, [n·G, R, C]."""
    query = q_nGRd.flatten(0, 1)
    scores = torch.cat([mixed_product(query, keys.mT, dtype) for keys, _ in parts], -1)
    return scores.mul_(q_nGRd.shape[-1] ** -0.5)


def _factors(pairs_C2NGd: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """Keys and values of a slice of tokens, [n·G, C, d] each: on a CPU in at least float32, elsewhere as they are."""
    part = pairs_C2NGd[:, :, tokens].flatten(2, 3)
    if part.device.type == "cpu":
        part = part.to(torch.promote_types(part.dtype, torch.float32))
    keys, values = part.unbind(1)
    return keys.transpose(0, 1), values.transpose(0, 1)


def _token_slices(pairs: Sequence[Tensor]) -> Iterator[slice]:
    """The N tokens of the columns, in slices of about ``SLICE_ELEMENTS`` elements of keys."""
    _, _, num_tokens, heads, size = pairs[0].shape
    columns = sum(len(part) for part in pairs)
    elements = SLICE_ELEMENTS if pairs[0].device.type == "cpu" else SLICE_ELEMENTS_GPU
    step = max(SLICE_TOKENS, elements // (columns * heads * size))
    for begin in range(0, num_tokens, step):
        yield slice(begin, min(begin + step, num_tokens))
