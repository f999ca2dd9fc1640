"""Gated residual (Qwen, arXiv 2608.30320): n residual streams, read through gates per channel and written through gates per stream."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.model.architectures.gated_residual.architecture import GatedResidual

ARCHITECTURES.register("gated_residual")(GatedResidual)
