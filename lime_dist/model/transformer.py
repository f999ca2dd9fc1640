"""What attention and SwiGLU cost, by formula, and how their parameters start: the part that all architectures share.

Imports no torch: plans are made without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Flops, Group, Sizes
from lime_dist.model.scaling import base_depth, width_multiplier

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EMBEDDING = "model.embed_tokens"
EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
HEAD_WEIGHT = "lm_head.weight"


# -- parameters -----------------------------------------------------------------------------------------------------------


def projection_parameters(config: ModelConfig) -> Sizes:
    """Parameters of a layer's attention and SwiGLU, by name within the layer."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys = config.key_value_heads * config.head_size
    return {
        "self_attn.q_proj.weight": hidden * queries,
        "self_attn.k_proj.weight": hidden * keys,
        "self_attn.v_proj.weight": hidden * keys,
        "self_attn.o_proj.weight": hidden * queries,
        **{f"mlp.{name}_proj.weight": hidden * config.intermediate_size for name in ("gate", "up", "down")},
        **({f"self_attn.{name}_norm.weight": config.head_size for name in "qk"} if config.numerics.qk_norm else {}),
    }


def norm_parameters(config: ModelConfig) -> Sizes:
    """Parameters of the two RMSNorms of a pre-norm layer."""
    return {"input_layernorm.weight": config.hidden_size, "post_attention_layernorm.weight": config.hidden_size}


def shared_parameter_group(name: str) -> Group:
    """Optimizer group of a parameter that all architectures have: projections, embeddings, norms.

    Raises:
        ValueError: it is none of these.
    """
    if name.endswith("norm.weight") or name == EMBEDDING_WEIGHT:
        return "plain"
    if name.endswith("_proj.weight") or name == HEAD_WEIGHT:
        return "matrices"
    raise ValueError(f"the parameter {name} belongs to no optimizer group")


def initialise_shared(config: ModelConfig, name: str, value: Tensor, generator: torch.Generator) -> None:
    """Initial value of a parameter that all architectures have.

    Norms start at 1; matrices and embeddings at N(0, 0.02²), with ``o_proj`` and ``down_proj`` divided by √(2L), as far as `scaling`
    does not say otherwise.
    """
    if shared_parameter_group(name) == "plain" and name != EMBEDDING_WEIGHT:
        value.fill_(1.0)
        return
    width = width_multiplier(config)
    std = 0.02 / {EMBEDDING_WEIGHT: 1.0, HEAD_WEIGHT: width}.get(name, math.sqrt(width))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * base_depth(config))
    value.normal_(0.0, std, generator=generator)


# -- FLOPs ----------------------------------------------------------------------------------------------------------------


def transformer_flops(config: ModelConfig, sequence_length: float) -> Flops:
    """FLOPs per token of a layer's projections, SwiGLU and causal attention.

    Attention counts the pairs that the mask leaves, (T + 1)/2 per token; its backward pass computes the scores again.
    """
    hidden, size, heads = config.hidden_size, config.head_size, config.num_attention_heads
    products = 2 * hidden * (2 * size * (heads + config.key_value_heads) + 3 * config.intermediate_size)
    attention = 2 * 2 * heads * size * (sequence_length + 1) / 2
    return Flops(products + attention, 2 * products + 2.5 * attention, products)


# -- activations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """What autograd keeps from forward to backward, in elements.

    Attributes:
        per_token: in the precision of the run, for each token.
        accumulated_per_token: in at least float32, for each token.
        fixed: in the precision of the run, whatever the number of tokens.
        accumulated_fixed: in at least float32, whatever the number of tokens.
    """

    per_token: int = 0
    accumulated_per_token: int = 0
    fixed: int = 0
    accumulated_fixed: int = 0

    def __add__(self, other: Activations) -> Activations:
        return Activations(
            self.per_token + other.per_token,
            self.accumulated_per_token + other.accumulated_per_token,
            self.fixed + other.fixed,
            self.accumulated_fixed + other.accumulated_fixed,
        )

    def nbytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes for so many tokens; ``itemsize``: of the precision of the run."""
        accumulated = num_tokens * self.accumulated_per_token + self.accumulated_fixed
        return itemsize * (num_tokens * self.per_token + self.fixed) + accumulation_itemsize(itemsize) * accumulated


def transformer_activations(config: ModelConfig, keeps_keys: bool = False) -> Activations:
    """What attention and SwiGLU keep of a layer.

    Args:
        keeps_keys: whether the memory of keys before norm and rotation is kept in any case.
    """
    norms = Activations()
    if config.numerics.qk_norm:  # queries and keys before the norm; root mean squares
        keys = 0 if keeps_keys else config.key_value_heads * config.head_size
        norms = Activations(config.hidden_size + keys, config.num_attention_heads + config.key_value_heads)
    return norms + Activations(
        # Queries, keys, values, output; gate, silu(gate), up, their product.
        per_token=2 * config.hidden_size + 2 * config.key_value_heads * config.head_size + 4 * config.intermediate_size,
        accumulated_per_token=config.num_attention_heads,  # log of the sum of exponentials
    )


def weight_pass_activations(config: ModelConfig) -> Activations:
    """What the weight gradients of attention and SwiGLU are made from."""
    queries, keys = config.num_attention_heads * config.head_size, config.key_value_heads * config.head_size
    inputs = 2 * config.hidden_size + queries + config.intermediate_size  # normed states, attention, SwiGLU's product
    gradients = queries + 2 * keys + 2 * config.intermediate_size + 2 * config.hidden_size
    return Activations(per_token=inputs + gradients)


def norm_activations(config: ModelConfig) -> Activations:
    """What the two RMSNorms of a pre-norm layer keep."""
    return Activations(
        per_token=2 * 2 * config.hidden_size,  # inputs, outputs
        accumulated_per_token=2,  # root mean squares
    )
