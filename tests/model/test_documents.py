"""Protects the document mask: a sample of several documents is computed as if each of them were alone, by every architecture."""

from __future__ import annotations

import pytest
import torch
from model.test_cost import KeptMemory
from support.models import MODELS, small
from support.policies import POLICIES
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.data.documents import positions
from lime_dist.model import cost, documents
from lime_dist.model.documents import attention_with_mask, block_mask, document_mask, document_starts

EOS = 2
TOKENS = torch.tensor([[5, 6, 7, EOS, EOS, 9, 4, 3, 8, EOS, 11, 12], [EOS, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12, EOS]])
"""A document of eos alone, one that begins before the sample, one that ends with it, and one that does not end in it."""


def pieces(tokens_T: Tensor) -> list[Tensor]:
    """The documents of a sample."""
    ends = [index + 1 for index, token in enumerate(tokens_T.tolist()) if token == EOS]
    bounds = sorted({0, *ends, len(tokens_T)})
    return [tokens_T[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


def test_starts_and_positions() -> None:
    starts = document_starts(TOKENS, EOS)
    assert starts.tolist() == [[0, 0, 0, 0, 4, 5, 5, 5, 5, 5, 10, 10], [0, *[1] * 11]]
    wanted = [index for row in TOKENS for piece in pieces(row) for index in range(len(piece))]
    assert positions(TOKENS.numpy(), EOS).flatten().tolist() == wanted
    assert (torch.arange(12) - starts).flatten().tolist() == wanted


KINDS = [name for name in MODELS if not any(policy in name for policy in list(POLICIES)[1:])]
"""Without the history policies, which are not about tokens."""


@pytest.mark.parametrize("name", KINDS)
def test_a_document_is_computed_as_if_alone(name: str) -> None:
    """Logits, and the gradients of all parameters; with activation checkpointing too."""
    decoder = build_decoder(small(**MODELS[name]), dtype=torch.float64)
    for parameter_name, parameter in decoder.named_parameters():
        perturb(parameter_name, parameter)
    alone = torch.stack([torch.cat([decoder(piece[None])[0] for piece in pieces(row)]) for row in TOKENS])
    weights = torch.linspace(-1, 1, alone.numel(), dtype=torch.float64).view_as(alone)
    wanted = torch.autograd.grad((alone * weights).sum(), list(decoder.parameters()), allow_unused=True)
    assert (alone - decoder(TOKENS)).abs().max() > 1e-3, "without the mask, documents must matter to each other"
    for checkpointing in (False, True):
        decoder.activation_checkpointing = checkpointing
        packed = decoder(TOKENS, document_starts(TOKENS, EOS))
        assert (packed - alone).abs().max() <= 1e-10 * alone.abs().max()
        own = torch.autograd.grad((packed * weights).sum(), list(decoder.parameters()), allow_unused=True)
        for one, other in zip(own, wanted, strict=True):
            if other is not None:
                assert one is not None and (one - other).abs().max() <= 1e-10 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_stage_keeps_of_documents(dtype: torch.dtype) -> None:
    """Tables and mask exist once for all layers."""
    config = small(architecture="llama")
    decoder = build_decoder(config, dtype=dtype)
    kept = []
    for starts in (None, document_starts(TOKENS, EOS)):
        table = decoder.model.layers[0].self_attn.positions(torch.zeros(2, 12, 24, dtype=dtype), None)
        memory = KeptMemory([*decoder.parameters(), table.cos, table.sin])
        with memory.counting():
            decoder(TOKENS, starts)
        kept.append(memory.bytes)
    mask = TOKENS.numel() * 12 * dtype.itemsize
    assert kept[1] - kept[0] == cost.document_bytes(config, TOKENS.numel(), 12, dtype.itemsize) + mask
    moda = small(lime={"depth_attention": "moda"})
    kept_mask = (
        build_decoder(moda).model.layers[0].self_attn.positions(torch.zeros(2, 12, 24, dtype=dtype), starts).mask
    )
    assert kept_mask.nbytes == mask == cost.document_bytes(moda, 24, 12, dtype.itemsize) - (kept[1] - kept[0] - mask)


@pytest.mark.parametrize("length", [1, 127, 128, 300, 512])
def test_the_blocks_of_flex_attention(length: int) -> None:
    """The same blocks as torch finds by looking at all pairs; documents begin and end anywhere in blocks."""
    tokens = torch.randint(3, 200, (3, length), generator=torch.Generator().manual_seed(length))
    tokens[0, length // 2 :: 64], tokens[1, 127::128] = EOS, EOS
    starts = document_starts(tokens, EOS)
    own = block_mask(starts)
    wanted = create_block_mask(own.mask_mod, 3, None, length, length, device="cpu")
    assert torch.equal(own.to_dense(), wanted.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{kind}_num_blocks") for mask in (own, wanted))
        assert torch.equal(counts, others), kind
        for row, other, count in zip(
            *(getattr(mask, f"{kind}_indices").flatten(0, -2) for mask in (own, wanted)), counts.flatten(), strict=True
        ):
            assert row[:count].tolist() == other[:count].tolist(), kind


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_reads_what_the_tensor_mask_leaves() -> None:
    """Flex attention as a formula on the CPU, forward. (Its kernels, and its backward pass, are for CUDA.)"""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, count, 150, 16, dtype=torch.float64, generator=generator) for count in (4, 2, 2))
    tokens = torch.randint(0, 40, (2, 150), generator=generator)
    starts = document_starts(tokens, EOS)
    outs = [attention_with_mask(q, k, v, mask) for mask in (document_mask(starts, q.dtype, 16), block_mask(starts))]
    assert (outs[0] - outs[1]).abs().max() <= 1e-12


def test_a_compiled_layer_takes_any_block_mask() -> None:
    """A layer on CUDA is traced as one graph, and not again for the next micro-batch, whose documents begin elsewhere."""
    layer = build_decoder(small(architecture="llama")).model.layers[0]
    traced = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compute = torch.compile(layer.compute, backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(2, 12, 24)
    for turn in range(3):
        starts = document_starts(TOKENS.roll(turn, 1), EOS)
        blocks = layer.self_attn.positions(x, starts)._replace(mask=block_mask(starts))
        with torch.no_grad():
            wanted = layer.compute(x, layer.self_attn.positions(x, starts))
            torch.testing.assert_close(compute(x, blocks), wanted)
    assert len(traced) == 1


def test_what_flex_attention_cannot_compute_gets_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True

    monkeypatch.setattr(documents, "block_mask", lambda starts: "blocks")
    monkeypatch.setattr(documents, "find_spec", lambda name: name)
    assert document_mask(OnCuda(), torch.bfloat16, 64) == "blocks"  # type: ignore[arg-type]  # says only where it is
    starts = document_starts(TOKENS, EOS)
    assert isinstance(document_mask(starts, torch.bfloat16, 64), Tensor)
