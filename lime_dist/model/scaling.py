"""How a model's scales follow its width and its depth, from those of a base model for which they were tuned. Imports no torch.

With m = hidden_size / base_hidden_size (µP, arXiv 2203.03466, table 3, for Adam): matrices start with a standard deviation over √m, the
output projection over m, and learn at lr / m; a tied embedding learns at lr, and its logits are divided by m. Embeddings, norms and
routers stay as they are. Every step shrinks matrices by lr · weight_decay, whatever m is. The head size must not follow the width.

With d = num_hidden_layers / base_num_hidden_layers (depth-µP, arXiv 2310.02244): outputs of attention and SwiGLU are divided by √d, and
``o_proj`` and ``down_proj`` start as in the base model.
"""

from __future__ import annotations

import math

from lime_dist.config.schema import ModelConfig


def width_multiplier(config: ModelConfig) -> float:
    """m: 1 without ``base_hidden_size``."""
    base = config.numerics.base_hidden_size
    return 1.0 if base is None else config.hidden_size / base


def base_depth(config: ModelConfig) -> int:
    """The number of layers for which the initial values of ``o_proj`` and ``down_proj`` are made."""
    base = config.numerics.base_num_hidden_layers
    return config.num_hidden_layers if base is None else base


def residual_scale(config: ModelConfig) -> float:
    """The factor of the outputs of attention and SwiGLU."""
    return config.numerics.residual_scale * math.sqrt(base_depth(config) / config.num_hidden_layers)


def logit_scale(config: ModelConfig) -> float:
    """The factor of the logits, before they are bounded."""
    return 1 / width_multiplier(config) if config.tie_word_embeddings else 1.0
