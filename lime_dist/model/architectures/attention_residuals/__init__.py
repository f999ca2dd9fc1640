"""Attention Residuals (arXiv 2603.15031): instead of a residual sum, every sub-layer reads a softmax over earlier outputs."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.model.architectures.attention_residuals.architecture import AttentionResiduals

ARCHITECTURES.register("attention_residuals")(AttentionResiduals)
