"""What travels over a stage boundary: encodes payloads and gradients for the way, and decodes what has arrived.

Without quantised parts, what travels is the payload in the type of the wire. With them (``pipeline.wire_dtype: fp8``) it is one
tensor of bytes: the other parts in their type, the blocks' largest magnitudes in bf16, and the elements as float8 e4m3.

A block's largest magnitude m is sent as it is, and 448, the largest float8, stands for it: x is sent as x·448/m, rounded. So m
survives, and decoding and encoding again, at the next boundary, gives the same bytes: an entry is rounded once, however many
boundaries it crosses. If an element is infinite or not a number, so is m, and then no element of the block arrives finite:
float8 e4m3 itself has no infinity. Gradients take the same form: in blocks with a scale of their own, float8 e4m3 has range
enough, and one more bit than e5m2 (`benchmarks/wire_precision.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lime_dist.config.precision import SCALE_BYTES
from lime_dist.pipeline.wire_format import WireFormat

FLOAT8 = torch.float8_e4m3fn
SCALE = torch.bfloat16
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Wire:
    """How payloads over one boundary, and their gradients, travel.

    Args:
        dtype: of payloads in the run.
        wire_dtype: of the parts that are not quantised; `WireFormat.dtype`.
    """

    wire_format: WireFormat
    dtype: torch.dtype
    wire_dtype: torch.dtype

    @property
    def is_identity(self) -> bool:
        """Whether a payload travels as it is."""
        return self.wire_dtype == self.dtype and not self.wire_format.quantised

    def empty(self, payload_shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Memory for what travels in the place of a payload of this shape."""
        if not self.wire_format.quantised:
            return torch.empty(payload_shape, dtype=self.wire_dtype, device=device)
        num_tokens = math.prod(payload_shape[:2])
        return torch.empty(self.wire_format.nbytes(num_tokens), dtype=torch.uint8, device=device)

    def encode(self, payload: Tensor) -> Tensor:
        """What travels in the place of a payload or gradient [B, T, …]; it is contiguous."""
        if not self.wire_format.quantised:
            return payload.to(self.wire_dtype).contiguous()
        sent = self.empty(tuple(payload.shape), payload.device)
        for part, places in self._places(payload.contiguous(), sent):
            if isinstance(places, Tensor):
                places.copy_(part)
            else:
                quantise(part.view(-1, self.wire_format.block), *places)
        return sent

    def decode(self, sent: Tensor, payload: Tensor) -> Tensor:
        """Fill a contiguous payload or gradient [B, T, …] with what has arrived, and return it."""
        if not self.wire_format.quantised:
            return payload.copy_(sent)
        for part, places in self._places(payload, sent):
            if isinstance(places, Tensor):
                part.copy_(places)
            else:
                dequantise(*places, part.view(-1, self.wire_format.block))
        return payload

    def _places(self, payload: Tensor, sent: Tensor) -> Iterator[tuple[Tensor, Tensor | tuple[Tensor, Tensor]]]:
        """Yield each part of a payload, flat, with its place in the bytes that travel; if it is quantised, the places of its scales
        [blocks] and elements [blocks, block].

        First come the parts that are not quantised, then the scales of the others, then their elements: so every place is aligned.
        """
        num_tokens, formats, block = math.prod(payload.shape[:2]), self.wire_format.parts, self.wire_format.block
        parts = payload.view(-1).split([part.elements * num_tokens for part in formats])
        plain = [part for part, form in zip(parts, formats, strict=True) if not form.is_quantised]
        quantised = [part for part, form in zip(parts, formats, strict=True) if form.is_quantised]
        sizes = [part.numel() * self.wire_dtype.itemsize for part in plain]
        sizes += [part.numel() // block * SCALE_BYTES for part in quantised]
        pieces = iter(sent.split([*sizes, *(part.numel() for part in quantised)]))
        for part in plain:
            yield part, next(pieces).view(self.wire_dtype)
        scales = [next(pieces).view(SCALE) for _ in quantised]
        for part, each in zip(quantised, scales, strict=True):
            yield part, (each, next(pieces).view(FLOAT8).view(-1, block))


def quantise(blocks: Tensor, scales: Tensor, elements: Tensor) -> None:
    """Write blocks [n, block] as bf16 ``scales`` [n], their largest magnitudes, and float8 ``elements`` [n, block]."""
    scales.copy_(blocks.abs().amax(1))
    elements.copy_(torch.div(blocks, _units(scales, blocks.dtype), out=torch.empty_like(blocks)))


def dequantise(scales: Tensor, elements: Tensor, blocks: Tensor) -> None:
    """The reverse of `quantise`."""
    blocks.copy_(elements).mul_(_units(scales, blocks.dtype))


def _units(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What 1 in float8 stands for in each block, [n, 1], in at least float32; above 0, so that zeros stay zeros."""
    accumulation_dtype = torch.promote_types(dtype, torch.float32)
    return (scales.to(accumulation_dtype) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
