"""Attention within documents (``data.document_mask``): where documents begin in a micro-batch, and the mask that follows.

Every token has the index at which its document begins within the sample: its start. A query reads the keys up to its own that have
the same start. The mask is made once for a micro-batch and shared by the layers of a stage. On CUDA it is a `BlockMask` of flex
attention, which leaves out blocks of keys that no query of a block reads; elsewhere, and for what flex attention cannot compute
there, it is a tensor that is added to the scores.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block of queries and of keys, flex attention's own default."""
LEAST_HEAD_SIZE = 16
"""Of flex attention's kernels."""


def document_starts(tokens_BT: Tensor, eos: int) -> Tensor:
    """By token, the index in its sample at which its document begins, int64 [B, T]: 0, or the index after an eos."""
    index = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    starts = torch.where(tokens_BT[:, :-1] == eos, index[1:], 0)
    return F.pad(starts, (1, 0)).cummax(1).values


def document_mask(starts_BT: Tensor, dtype: torch.dtype, head_size: int) -> Tensor | BlockMask:
    """The mask of causal attention within documents, for `attention_with_mask`.

    Args:
        starts_BT: of `document_starts`.
        dtype: of queries, keys and values.
    """
    if starts_BT.is_cuda and dtype != torch.float64 and head_size >= LEAST_HEAD_SIZE and find_spec("triton"):
        return block_mask(starts_BT)
    return tensor_mask(starts_BT, dtype)


def tensor_mask(starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a tensor that is added to the scores, [B, 1, T, T]."""
    index = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    is_read = (starts_BT.unsqueeze(2) == starts_BT.unsqueeze(1)) & (index.unsqueeze(1) >= index)
    mask = torch.zeros(is_read.shape, dtype=dtype, device=starts_BT.device)
    return mask.masked_fill_(~is_read, float("-inf")).unsqueeze(1)


def block_mask(starts_BT: Tensor) -> BlockMask:
    """The mask for flex attention, without the T × T table that ``create_block_mask`` makes: starts ascend, so those of the first and
    of the last query of a block say which blocks of keys the block reads, and which of them it reads as a whole."""
    from torch.nn.attention.flex_attention import BlockMask

    length = starts_BT.shape[1]
    count = -(-length // BLOCK)
    first_key = BLOCK * torch.arange(count, device=starts_BT.device)
    first, last = starts_BT[:, first_key], starts_BT[:, (first_key + BLOCK - 1).clamp(max=length - 1)]
    first_query = first_key.unsqueeze(1)
    is_read = (first_key + BLOCK > first.unsqueeze(-1)) & (first_key <= first_query)
    is_whole = (first_key >= last.unsqueeze(-1)) & (first_key < first_query) & (first_query + BLOCK <= length)

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts_BT[batch, query] <= key) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_numbered(is_read & ~is_whole),
        *_numbered(is_whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=reads,
        seq_lengths=(length, length),
    )


def _numbered(chosen_Bqk: Tensor) -> tuple[Tensor, Tensor]:
    """For every block of queries, the number of chosen blocks of keys, [B, 1, q], and their indices before all others, [B, 1, q, k]."""
    order = chosen_Bqk.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_Bqk.sum(-1).to(torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


def attention_with_mask(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Softmax attention [B, H, T, d] over the keys that a mask of `document_mask` leaves; H is a multiple of G."""
    group = q_BHTd.shape[1] // k_BGTd.shape[1]
    if not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        # Uncompiled it computes all scores. Within a compiled layer it is compiled with the layer.
        is_own_graph = q_BHTd.is_cuda and not torch.compiler.is_compiling()
        attend = _compiled_flex_attention() if is_own_graph else flex_attention
        out: Tensor = attend(q_BHTd, k_BGTd, v_BGTd, block_mask=mask, enable_gqa=group > 1)
        return out
    if (
        group > 1 and q_BHTd.device.type != "cpu"
    ):  # the GPU's kernels that take a mask need as many K/V heads as query heads
        k_BGTd, v_BGTd, group = k_BGTd.repeat_interleave(group, 1), v_BGTd.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, mask, enable_gqa=group > 1)


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
