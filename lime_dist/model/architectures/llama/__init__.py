"""LLaMA: pre-norm RMSNorm, rotary embedding, grouped-query attention, SwiGLU. No layer history."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.model.architectures.llama.architecture import Llama

ARCHITECTURES.register("llama")(Llama)
