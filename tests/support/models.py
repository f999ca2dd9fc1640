"""Every architecture, route and policy, at a size at which plain loops are fast enough."""

from __future__ import annotations

import torch
from support.policies import POLICIES
from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.decoder import Decoder, embed, open_history, run_layers
from lime_dist.model.mean_weights import MeanWeights


def small(**changes: object) -> ModelConfig:
    values = {
        "architecture": "lime", "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 11,
        "num_attention_heads": 6, "num_key_value_heads": 3,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, **changes})


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 1.5, "original_max_position_embeddings": 5,
}  # fmt: skip
"""With a head size of 4, the first frequency lies between the limits, and the second one is divided by the factor."""

NUMERICS = {
    "qk_norm": True, "logit_softcap": 2.0, "residual_scale": 0.7, "base_hidden_size": 12, "base_num_hidden_layers": 4,
}  # fmt: skip
"""All of ``model.numerics``."""

MODELS = {
    "llama": {"architecture": "llama"},
    "llama, G=H": {"architecture": "llama", "num_key_value_heads": 6, "rope_scaling": LLAMA3},
    "lime kv": {"num_key_value_heads": 1},
    "lime kv, G=3": {},
    "lime kv, G=H": {"num_key_value_heads": 6},
    "lime static": {"num_key_value_heads": 6, "lime": {"routes": "hidden"}},
    "lime static from layer 4": {
        "num_key_value_heads": 6,
        "lime": {"routes": "hidden", "start_layer": 4},
        "rope_scaling": LLAMA3,
    },
    "lime top_p": {"num_key_value_heads": 6, "lime": {"routes": "hidden", "top_p": 0.6}},
    "lime dynamic": {"num_key_value_heads": 6, "lime": {"routes": "hidden", "router": "dynamic"}},
    **{
        f"{kind}, {name}": {
            "num_key_value_heads": 3 if kind == "lime kv" else 6,
            "lime": {**routes, "history": history},
        }
        for kind, routes in {
            "lime kv": {"routes": "kv"},
            "lime static": {"routes": "hidden", "start_layer": 2},
            "lime dynamic": {"routes": "hidden", "router": "dynamic"},
        }.items()
        for name, history in list(POLICIES.items())[1:]
    },
    "moda": {"num_key_value_heads": 6, "lime": {"depth_attention": "moda"}},
    **{
        f"moda, MLP, {name}": {"lime": {"depth_attention": "moda", "mlp_entries": True, "history": POLICIES[name]}}
        for name in ("full", "first_last", "chunked, two rows", "dilated")
    },
    "value residual": {"architecture": "value_residual", "value_residual": {"weight": 0.3}},
    "value residual, learnable": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "hyper static": {"architecture": "hyper", "hyper": {"rate": 2, "dynamic": False}},
    "hyper dynamic": {"architecture": "hyper", "hyper": {"rate": 3}},
    "hyper, one stream": {
        "architecture": "hyper",
        "hyper": {"rate": 1},
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 3}},
    "hyper doubly stochastic": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic", "rate": 3}},
    "hyper permutations": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 3}},
    **{
        f"attention residuals, {size}": {
            "architecture": "attention_residuals",
            "attention_residuals": {"block_size": size},
        }
        for size in (1, 3, 10)
    },
    "llama, numerics": {"architecture": "llama", "numerics": NUMERICS},
    "lime kv, numerics": {"numerics": NUMERICS},
    "lime static, numerics": {
        "num_key_value_heads": 6,
        "lime": {"routes": "hidden", "start_layer": 4},
        "numerics": NUMERICS,
    },
    "value residual, numerics": {"architecture": "value_residual", "numerics": NUMERICS},
    "moda, numerics": {"lime": {"depth_attention": "moda", "mlp_entries": True}, "numerics": NUMERICS},
    "hyper, numerics": {"architecture": "hyper", "hyper": {"rate": 2}, "numerics": NUMERICS},
    "gated residual, numerics": {"architecture": "gated_residual", "gated_residual": {"rate": 2}, "numerics": NUMERICS},
    "attention residuals, numerics": {"architecture": "attention_residuals", "numerics": NUMERICS},
}


def means_of(decoder: Decoder, tokens_BT: Tensor) -> dict[str, Tensor]:
    """The mean weights over tokens with which the layers read in a forward pass, as `head_map` takes them."""
    embedding, *layers, _, _ = (decoder.get_submodule(spec.name) for spec in decoder.specs)
    hidden = embed(decoder.config, embedding, tokens_BT)
    history = open_history(decoder.config, decoder.layout, tokens_BT.numel(), hidden.dtype, hidden.device)
    assert history is not None
    history.mean_weights = MeanWeights()
    with torch.no_grad():
        run_layers(layers, hidden, history, False)
    return history.mean_weights.by_name()
