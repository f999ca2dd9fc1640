"""What arrives of quantised entries, by arithmetic that `lime_dist.pipeline.wire` does not use."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_to_float8(entries: Tensor, block: int) -> Tensor:
    """Entries [elements] as a boundary with ``wire_dtype: fp8`` gives them on: of each block, the largest magnitude in bf16 stands
    for 448, and the elements are rounded to 4 significant bits, or to multiples of 2⁻⁹ where these are larger."""
    blocks = entries.double().view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True).to(torch.bfloat16).double()
    unit = torch.where(largest == 0, 1.0, largest / 448)
    magnitudes = (blocks.abs() / unit).float().double()  # as torch casts float64 to float8
    exponents = torch.frexp(magnitudes).exponent - 1
    steps = torch.ldexp(torch.ones_like(magnitudes), exponents.clamp(min=-6) - 3)
    rounded = (magnitudes / steps).round() * steps
    return (blocks.sign() * rounded.clamp(max=448.0) * unit).to(entries.dtype).view(-1)
