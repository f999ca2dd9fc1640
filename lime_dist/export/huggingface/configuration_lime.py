"""Configuration of a decoder that lime_dist trained."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class LimeConfig(PretrainedConfig):
    """Shape of the decoder, with LLaMA's names, and which entries of the layer history its layers read.

    Args:
        architecture: the name of its architecture in lime_dist, such as "lime".
        rope_parameters: how the frequencies of the rotary embedding are scaled, as in transformers: rope_type ("default",
            "linear" or "llama3"), factor, and for "llama3" low_freq_factor, high_freq_factor, original_max_position_embeddings.
        max_position_embeddings: the sequence length of training. It is not a limit: longer sequences work.
        numerics: section ``model.numerics`` of the run: qk_norm, logit_softcap, residual_scale, base_hidden_size,
            base_num_hidden_layers.
        lime: section ``model.lime`` of the run: routes ("kv" or "hidden"), router, top_p, start_layer, history.
        hyper: section ``model.hyper`` of the run: connection, rate (number of residual streams), dynamic.
        gated_residual: section ``model.gated_residual`` of the run: rate (number of residual streams).
        value_residual: section ``model.value_residual`` of the run: weight, learnable.
        attention_residuals: section ``model.attention_residuals`` of the run: block_size (in sub-layers).
        reads: for every layer, the entries that it reads, as runs in the order of its router's columns. ["slots", 0, 3] are the
            slots of layers 0, 1, 2; ["summaries", 0, 2] are the first two summary rows, counted over all chunks.
        chunks: for every chunk of layers that is summarised: first layer, end (exclusive), number of rows.
    """

    model_type = "lime"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        architecture: str = "lime",
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = True,
        numerics: dict[str, Any] | None = None,
        lime: dict[str, Any] | None = None,
        hyper: dict[str, Any] | None = None,
        gated_residual: dict[str, Any] | None = None,
        value_residual: dict[str, Any] | None = None,
        attention_residuals: dict[str, Any] | None = None,
        reads: list[list[list[Any]]] | None = None,
        chunks: list[list[int]] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        if rope_parameters is not None:
            self.rope_parameters = rope_parameters
        self.max_position_embeddings = max_position_embeddings
        self.numerics = numerics if numerics is not None else {}
        self.lime = lime if lime is not None else {}
        self.hyper = hyper if hyper is not None else {}
        self.gated_residual = gated_residual if gated_residual is not None else {}
        self.value_residual = value_residual if value_residual is not None else {}
        self.attention_residuals = attention_residuals if attention_residuals is not None else {}
        self.reads = reads if reads is not None else []
        self.chunks = chunks if chunks is not None else []
        self.use_cache = use_cache
        width = hidden_size / (self.numerics.get("base_hidden_size") or hidden_size)
        self.logit_scale = 1 / width if tie_word_embeddings else 1.0
        depth = num_hidden_layers / (self.numerics.get("base_num_hidden_layers") or num_hidden_layers)
        self.residual_scale = self.numerics.get("residual_scale", 1.0) / math.sqrt(depth)
        super().__init__(**{**kwargs, "tie_word_embeddings": tie_word_embeddings})
