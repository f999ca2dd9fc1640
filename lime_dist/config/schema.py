"""The typed, frozen sections of a run's configuration; an unknown key or an impossible value is an error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    directory: str = "runs/default"


HISTORY_KEYS: dict[str, dict[str, int]] = {
    "full": {},
    "first_last": {"first": 2, "last": 1},
    "chunked": {"chunk_size": 8, "rank": 1, "first": 2},
    "dilated": {"stride": 4, "first": 1, "last": 1},
}
"""By policy: the keys that it has, with their defaults."""


class HistoryConfig(Section):
    """Which entries a layer reads (design: history policies). A key that the policy does not have is an error."""

    policy: Literal["full", "first_last", "chunked", "dilated"] = "full"
    first: int | None = Field(None, ge=0, description="the slots of the first layers, read by all (not: full)")
    last: int | None = Field(None, ge=0, description="the slots right before a layer's own (first_last, dilated)")
    chunk_size: int | None = Field(None, ge=1, description="layers that are summarised together (chunked)")
    rank: int | None = Field(None, ge=1, description="rows of a summary (chunked)")
    stride: int | None = Field(None, ge=1, description="every which slot all later layers read (dilated)")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Defaults of the policy, so that a resolved configuration names every number."""
        if not isinstance(values, dict):
            return values
        defaults = (
            HISTORY_KEYS.get(values.get("policy", "full"), {}) if isinstance(values.get("policy", ""), str) else {}
        )
        given = {key: value for key, value in values.items() if value is not None}
        return {**defaults, **given}

    @model_validator(mode="after")
    def _keys_fit(self) -> HistoryConfig:
        for key in ("first", "last", "chunk_size", "rank", "stride"):
            value = getattr(self, key)
            if value is not None and key not in HISTORY_KEYS[self.policy]:
                raise ValueError(
                    f"model.lime.history.{key}={value} means nothing to policy: {self.policy}; leave it out, or set the "
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


class LimeConfig(Section):
    """Layer-Integrated Memory, arXiv 2502.09245."""

    routes: Literal["kv", "hidden"] = Field("kv", description="what is mixed: keys and values, or hidden states")
    router: Literal["static", "dynamic"] = Field("static", description="dynamic: per token (routes: hidden)")
    router_init: Literal["uniform", "identity"] = Field("uniform", description="of routes: kv")
    top_p: float | None = Field(None, gt=0, le=1, description="drop the smallest static weights (routes: hidden)")
    start_layer: int = Field(1, ge=1, description="first layer that reads the history (routes: hidden)")
    history: HistoryConfig = HistoryConfig()

    @model_validator(mode="after")
    def _combination(self) -> LimeConfig:
        if self.routes == "kv":
            for key, default in (("router", "static"), ("top_p", None), ("start_layer", 1)):
                if getattr(self, key) != default:
                    raise ValueError(
                        f"model.lime.{key}={getattr(self, key)} needs model.lime.routes=hidden; "
                        "with routes: kv every layer from 1 on has a static, signed router"
                    )
        if self.routes == "hidden" and self.router_init != "uniform":
            raise ValueError(f"model.lime.router_init={self.router_init} needs model.lime.routes=kv")
        if self.router == "dynamic" and self.top_p is not None:
            raise ValueError(f"model.lime.top_p={self.top_p} prunes static weights; it needs model.lime.router=static")
        return self


class HyperConfig(Section):
    """Hyper-Connections, arXiv 2409.19606."""

    rate: int = Field(4, ge=1, description="residual streams")
    dynamic: bool = Field(True, description="connection weights depend on the token")


class ModelConfig(Section):
    """Shape of the decoder; the names are those of Hugging Face's LLaMA configuration."""

    architecture: Literal["llama", "lime", "hyper"] = "lime"
    vocab_size: int = Field(4096, ge=2)
    hidden_size: int = Field(128, ge=1)
    intermediate_size: int = Field(512, ge=1)
    num_hidden_layers: int = Field(16, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1, description="None: as many as num_attention_heads")
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    tie_word_embeddings: bool = True
    lime: LimeConfig = LimeConfig()
    hyper: HyperConfig = HyperConfig()

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
    def _routes_fit(self) -> ModelConfig:
        if self.architecture != "lime" or self.lime.routes != "hidden":
            return self
        if self.key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"model.num_key_value_heads={self.num_key_value_heads} must equal model.num_attention_heads="
                f"{self.num_attention_heads} with model.lime.routes=hidden, which routes every head by itself"
            )
        if self.lime.start_layer >= self.num_hidden_layers:
            raise ValueError(
                f"model.lime.start_layer={self.lime.start_layer} is past the last layer, "
                f"{self.num_hidden_layers - 1} (model.num_hidden_layers={self.num_hidden_layers})"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads


class BlendEntry(Section):
    path: str
    weight: float = Field(gt=0)


class DataConfig(Section):
    """Where samples come from: ``path``, or ``blend``. Either names folders made by ``data_tools.pretokenize``, or prefixes
    of Megatron's ``.bin``/``.idx`` pairs."""

    path: str | None = "data/quickstart/shards"
    blend: list[BlendEntry] | None = Field(
        None, min_length=1, description="datasets with their weights, instead of path"
    )
    validation_fraction: float = Field(
        0.01, gt=0, lt=1, description="of a .bin/.idx pair, which has no splits: the last documents are held out"
    )
    sequence_length: int = Field(256, ge=1)
    seed: int = 0
    answer_token: int | None = Field(
        None, ge=0, description="count only the tokens after this one, to the end of the document; None: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _blend_replaces_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("blend") is not None:
            return {"path": None, **values}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.path is None) == (self.blend is None):
            raise ValueError("set either data.path or data.blend: data.path=null goes with data.blend")
        if self.blend is not None and self.answer_token is not None:
            raise ValueError(f"data.answer_token={self.answer_token} needs data.path; it does not go with data.blend")
        return self

    @property
    def paths(self) -> list[str]:
        """Of all datasets."""
        return [entry.path for entry in self.blend or []] if self.path is None else [self.path]


class BatchRampConfig(Section):
    """A global batch that grows from ``start`` by ``increment`` at a time while the first ``samples`` are consumed."""

    start: int = Field(ge=1)
    increment: int = Field(ge=1)
    samples: int = Field(ge=1)


class TrainConfig(Section):
    steps: int = Field(300, ge=0)
    seed: int = 0
    global_batch_size: int = Field(16, ge=1, description="samples a step, over all micro-batches and replicas")
    batch_ramp: BatchRampConfig | None = Field(None, description="smaller global batches at first")
    micro_batch_size: int = Field(2, ge=1, description="samples a micro-batch of one replica")
    evaluation_interval: int = Field(100, ge=0, description="steps between validations; 0: only at the end")
    evaluation_samples: int = Field(64, ge=0, description="validation samples; 0: no validation")
    checkpoint_interval: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int | None = Field(3, ge=1, description="newest checkpoints that stay on disk; None: all")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints of steps that this divides stay for good, beside train.keep_last"
    )
    max_consecutive_skips: int = Field(
        10,
        ge=1,
        description="updates in a row that may be skipped for a loss or gradient that is not finite; then it stops",
    )
    spike_factor: float | None = Field(
        None, gt=1, description="a loss of so many times the recent median goes back to the checkpoint; None: never"
    )
    log_interval: int = Field(10, ge=1, description="steps between console lines")
    compile: bool = Field(False, description="compile the parts of a layer with torch.compile; needs a compiler")

    @model_validator(mode="after")
    def _ramp_arrives(self) -> TrainConfig:
        ramp = self.batch_ramp
        if ramp is not None and (
            ramp.start >= self.global_batch_size or (self.global_batch_size - ramp.start) % ramp.increment
        ):
            raise ValueError(
                f"train.batch_ramp: from start={ramp.start} in steps of increment={ramp.increment} the batch does not come "
                f"to train.global_batch_size={self.global_batch_size}"
            )
        return self


class CheckpointConfig(Section):
    """How checkpoints are written; when, and which stay, is in ``train``."""

    asynchronous: bool = Field(
        False,
        description="write in the background, from a copy in host memory (12 bytes a parameter, shared out over ranks)",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="the run, when a checkpoint or a record cannot be written (a full disk)"
    )


class OptimizerConfig(Section):
    """AdamW, cosine schedule; the defaults are the paper's settings."""

    lr: float = Field(1e-3, gt=0)
    router_lr: float = Field(1e-2, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr} is above optimizer.lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        return self


class ParallelConfig(Section):
    pipeline_stages: int = Field(1, ge=1)
    topology: Literal["stages_together", "replicas_together"] = Field(
        "stages_together", description="what shares a host: a replica's neighbouring stages, or a stage's replicas"
    )
    zero_stage: Literal[0, 1] = 0
    stage_layers: list[int] | None = Field(None, description="decoder layers per stage, by hand")
    balance: Literal["compute", "memory"] = Field(
        "compute", description="what stages share evenly, unless stage_layers"
    )
    activation_checkpointing: bool = False


class PipelineConfig(Section):
    """How payloads travel between stages."""

    engine: Literal["overlap", "stock"] = Field(
        "overlap", description="stock: DeepSpeed's schedule and blocking transfers"
    )
    extra_in_flight: int = Field(
        1, ge=0, description="extra micro-batches per boundary downstream, to hide transfers (overlap)"
    )
    wire_dtype: Literal["bf16"] | None = Field(None, description="of payloads and their gradients; None: as precision")
    timeout: float = Field(
        600.0, gt=0, le=1e6, description="seconds after which a stage that does not get on ends the job"
    )


class MonitorConfig(Section):
    """What is watched while a run goes on; numbers of all stages come with every ``train.log_interval``."""

    router_interval: int = Field(100, ge=0, description="steps between pictures of what layers read; 0: none")
    router_layer: int | None = Field(None, ge=0, description="whose heads are drawn apart; None: the last layer")
    peak_flops: float | None = Field(
        None, gt=0, description="of one device, a second, for its share (mfu); None: measured at the start"
    )


class Config(Section):
    """One run. ``precision``: of weights and activations; accumulation, moments and masters are never below float32.

    ``fp64`` is for proofs: the equality tests run whole training steps in it.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    monitor: MonitorConfig = MonitorConfig()
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        layers, stages = self.model.num_hidden_layers, self.parallel.pipeline_stages
        if stages > layers:
            raise ValueError(
                f"parallel.pipeline_stages={stages} is more than model.num_hidden_layers={layers}; "
                "every stage needs a layer"
            )
        watched = self.monitor.router_layer
        if watched is not None and watched >= layers:
            raise ValueError(
                f"monitor.router_layer={watched} is past the last layer, {layers - 1} (model.num_hidden_layers={layers})"
            )
        by_hand = self.parallel.stage_layers
        if by_hand is not None and (len(by_hand) != stages or sum(by_hand) != layers or min(by_hand) < 1):
            raise ValueError(
                f"parallel.stage_layers={by_hand} must be {stages} positive numbers (parallel.pipeline_stages) "
                f"that add up to {layers} (model.num_hidden_layers)"
            )
        return self
