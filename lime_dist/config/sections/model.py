"""The shape of the decoder and its layer history: ``model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lime_dist.config.registry import ARCHITECTURES, CONNECTIONS, choice_of
from lime_dist.config.sections.base import Section
from lime_dist.config.sections.numerics import NumericsConfig
from lime_dist.config.sections.rope import RopeScalingConfig

if TYPE_CHECKING:
    ArchitectureName = str
    ConnectionName = str
else:
    ArchitectureName = choice_of(ARCHITECTURES)
    ConnectionName = choice_of(CONNECTIONS)


HISTORY_KEYS: dict[str, dict[str, int]] = {
    "full": {},
    "first_last": {"first": 2, "last": 1},
    "chunked": {"chunk_size": 8, "rank": 1, "first": 2},
    "dilated": {"stride": 4, "first": 1, "last": 1},
}
"""The keys of each policy, with their defaults."""


class HistoryConfig(Section):
    """The entries of the layer history that a layer reads. A key that the policy does not use is an error."""

    policy: Literal["full", "first_last", "chunked", "dilated"] = Field(
        "full",
        description="the rule: all earlier slots; the first and the last ones; summaries of chunks of layers; or every "
        "`stride`-th slot",
    )
    first: int | None = Field(
        None, ge=0, description="number of first layers whose slots every later layer reads (all policies but `full`)"
    )
    last: int | None = Field(
        None, ge=0, description="number of slots right before its own that a layer reads (`first_last`, `dilated`)"
    )
    chunk_size: int | None = Field(None, ge=1, description="layers per chunk (`chunked`)")
    rank: int | None = Field(None, ge=1, description="rows of each chunk's summary, at most `chunk_size` (`chunked`)")
    stride: int | None = Field(None, ge=1, description="all later layers read every `stride`-th slot (`dilated`)")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill in the policy's defaults, so that a resolved configuration shows every number."""
        if not isinstance(values, dict):
            return values
        defaults = (
            HISTORY_KEYS.get(values.get("policy", "full"), {}) if isinstance(values.get("policy", ""), str) else {}
        )
        given = cls.without_null(values)
        size = given.get("chunk_size")
        if "chunk_size" in defaults and isinstance(size, int):  # a default does not forbid small chunks
            defaults = {**defaults, "first": min(defaults["first"], max(size, 0))}
        return {**defaults, **given}

    @model_validator(mode="after")
    def _keys_fit(self) -> HistoryConfig:
        for key in ("first", "last", "chunk_size", "rank", "stride"):
            value = getattr(self, key)
            if value is not None and key not in HISTORY_KEYS[self.policy]:
                raise ValueError(
                    f"model.lime.history.{key}={value} is not a key of policy: {self.policy}; leave it out, or set the "
                    f"whole section at once: 'model.lime.history={{policy: {self.policy}}}'"
                )
        if self.policy == "chunked":
            first, chunk_size, rank = self.first or 0, self.chunk_size or 1, self.rank or 1
            if first > chunk_size or rank > chunk_size:
                key = "first" if first > chunk_size else "rank"
                raise ValueError(
                    f"model.lime.history.{key}={getattr(self, key)} is more than the {chunk_size} layers of a chunk "
                    "(model.lime.history.chunk_size)"
                )
        return self


ROUTES_KEYS: dict[str, tuple[str, ...]] = {
    "kv": ("router_init", "depth_attention"),
    "hidden": ("router", "top_p", "start_layer"),
}
"""By ``routes``: the keys that only they have."""
ROUTER_KEYS: dict[str, tuple[str, ...]] = {"static": ("top_p",), "dynamic": ()}
"""By ``router``: the keys that only it has."""
DEPTH_KEYS: dict[str, tuple[str, ...]] = {"none": ("router_init",), "moda": ("mlp_entries",)}
"""By ``depth_attention``: the keys that only it has."""


class LimeConfig(Section):
    """Layer-Integrated Memory (arXiv 2502.09245); used by `architecture: lime`."""

    routes: Literal["kv", "hidden"] = Field(
        "kv", description="what the routers mix: keys and values, or the hidden states from which they are computed"
    )
    router: Literal["static", "dynamic"] = Field(
        "static", description="`dynamic` computes the router's weights for each token; needs `routes: hidden`"
    )
    router_init: Literal["uniform", "identity"] = Field(
        "uniform",
        description="initial weights for earlier layers: random, as in the paper, or 0, so that the model starts as LLaMA; "
        "`identity` needs `routes: kv`",
    )
    depth_attention: Literal["none", "moda"] = Field(
        "none",
        description="`moda` (mixture-of-depths attention, arXiv 2603.15619): no routers; attention is one softmax over the sequence's keys "
        "of its own layer and the keys of earlier layers at the query's token; needs `routes: kv`",
    )
    mlp_entries: bool = Field(
        False,
        description="every layer also projects keys and values from the input of its MLP, for later layers; needs "
        "`depth_attention: moda`",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="keep each head's largest router weights until their sum exceeds this, and drop the rest; `null` "
        "keeps all; needs `routes: hidden` and `router: static`",
    )
    start_layer: int = Field(
        1, ge=1, description="first layer that reads the history, counted from 0; above 1 it needs `routes: hidden`"
    )
    history: HistoryConfig = HistoryConfig()

    @model_validator(mode="after")
    def _keys_fit(self) -> LimeConfig:
        for name, keys_of in (("routes", ROUTES_KEYS), ("router", ROUTER_KEYS), ("depth_attention", DEPTH_KEYS)):
            chosen = getattr(self, name)
            for choice, keys in keys_of.items():
                for key in keys:
                    value = getattr(self, key)
                    if choice != chosen and value != type(self).model_fields[key].default:
                        raise ValueError(
                            f"model.lime.{key}={value} needs model.lime.{name}={choice}; "
                            f"it has no meaning with model.lime.{name}={chosen}"
                        )
        return self


class HyperConfig(Section):
    """Hyper-Connections (arXiv 2409.19606) and their constrained forms; used by `architecture: hyper`."""

    connection: ConnectionName = Field(
        "free",
        description="how the streams are mixed: with any weights; with matrices that Sinkhorn's iteration makes doubly stochastic "
        "(mHC, arXiv 2512.24880); or with mixtures of permutations (mHC-lite, arXiv 2601.05732)",
    )
    rate: int = Field(4, ge=1, description="number of residual streams")
    dynamic: bool = Field(
        True,
        description="add a part to the connection weights that depends on the token; `false` needs `connection: free`",
    )


class ValueResidualConfig(Section):
    """Value residual (ResFormer, arXiv 2410.17897); used by `architecture: value_residual`."""

    weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the first layer's values in those of every later layer; its own have the rest",
    )
    learnable: bool = Field(False, description="both shares are parameters of each layer, which start at these values")


class GatedResidualConfig(Section):
    """Gated residual (Qwen, arXiv 2608.30320); used by `architecture: gated_residual`."""

    rate: int = Field(4, ge=1, description="number of residual streams")


class AttentionResidualsConfig(Section):
    """Attention Residuals (arXiv 2603.15031); used by `architecture: attention_residuals`."""

    block_size: int = Field(
        4,
        ge=1,
        description="sub-layers whose outputs are summed before later ones can read them; attention and SwiGLU of a layer are two; "
        "1: every output is read by itself (full attention residuals)",
    )


class ModelConfig(Section):
    """Architecture and size of the decoder. The keys are those of Hugging Face's `LlamaConfig`."""

    architecture: ArchitectureName = Field(
        "lime",
        description="`llama` is plain LLaMA, `lime` adds Layer-Integrated Memory to it, `hyper` adds Hyper-Connections, "
        "`gated_residual` adds residual streams with gates, `value_residual` adds the first layer's values to those of later layers, "
        "and `attention_residuals` replaces residual sums by attention over earlier outputs",
    )
    vocab_size: int = Field(4096, ge=2, description="rows of the embedding; at least the pieces of the tokenizer")
    hidden_size: int = Field(128, ge=1, description="width of the residual stream; a multiple of `num_attention_heads`")
    intermediate_size: int = Field(512, ge=1, description="width of the SwiGLU feed-forward layer")
    num_hidden_layers: int = Field(16, ge=1, description="number of decoder layers")
    num_attention_heads: int = Field(4, ge=1, description="number of query heads")
    num_key_value_heads: int | None = Field(
        None,
        ge=1,
        description="number of key/value heads, a divisor of `num_attention_heads`; `null` takes as many; "
        "`routes: hidden` needs as many",
    )
    rms_norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMS norms")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary embedding's frequencies")
    tie_word_embeddings: bool = Field(True, description="use the embedding's weight in the output projection too")
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    numerics: NumericsConfig = NumericsConfig()
    lime: LimeConfig = LimeConfig()
    hyper: HyperConfig = HyperConfig()
    gated_residual: GatedResidualConfig = GatedResidualConfig()
    value_residual: ValueResidualConfig = ValueResidualConfig()
    attention_residuals: AttentionResidualsConfig = AttentionResidualsConfig()

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} does not divide into "
                f"model.num_attention_heads={self.num_attention_heads} heads"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} over model.num_attention_heads={self.num_attention_heads} "
                "gives an odd head size; the rotary embedding needs an even one"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        return self

    @model_validator(mode="after")
    def _architecture_accepts(self) -> ModelConfig:
        ARCHITECTURES[self.architecture](self).check()
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads
