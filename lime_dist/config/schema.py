"""The configuration of a run: typed, frozen sections that reject unknown keys and impossible values.

Every key has a description. ``docs/configuration.md`` is made from them (`lime_dist.config.page`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lime_dist.config.registry import ARCHITECTURES, LEARNING_RATES, OPTIMIZERS, SCHEDULES, choice_of

if TYPE_CHECKING:
    ArchitectureName = str
    OptimizerName = str
    LearningRateName = str
    ScheduleName = str
else:
    ArchitectureName = choice_of(ARCHITECTURES)
    OptimizerName = choice_of(OPTIMIZERS)
    LearningRateName = choice_of(LEARNING_RATES)
    ScheduleName = choice_of(SCHEDULES)


class Section(BaseModel):
    """Base class of all sections: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """The folder of the run."""

    directory: str = Field(
        "runs/default",
        description="folder for checkpoints, metrics and TensorBoard files; if it holds a checkpoint, the run resumes",
    )


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
        given = {key: value for key, value in values.items() if value is not None}
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


ROUTES_KEYS: dict[str, tuple[str, ...]] = {"kv": ("router_init",), "hidden": ("router", "top_p", "start_layer")}
"""By ``routes``: the keys that only they have."""
ROUTER_KEYS: dict[str, tuple[str, ...]] = {"static": ("top_p",), "dynamic": ()}
"""By ``router``: the keys that only it has."""


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
        for chosen, keys_of in ((self.routes, ROUTES_KEYS), (self.router, ROUTER_KEYS)):
            name = "routes" if keys_of is ROUTES_KEYS else "router"
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
    """Hyper-Connections (arXiv 2409.19606); used by `architecture: hyper`."""

    rate: int = Field(4, ge=1, description="number of residual streams")
    dynamic: bool = Field(True, description="add a part to the connection weights that depends on the token")


class ModelConfig(Section):
    """Architecture and size of the decoder. The keys are those of Hugging Face's `LlamaConfig`."""

    architecture: ArchitectureName = Field(
        "lime", description="plain LLaMA, LLaMA with Layer-Integrated Memory, or LLaMA with Hyper-Connections"
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
    def _architecture_accepts(self) -> ModelConfig:
        ARCHITECTURES[self.architecture](self).check()
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads


class BlendEntry(Section):
    """One dataset of a blend."""

    path: str = Field(description="a folder or a prefix, as in `data.path`")
    weight: float = Field(gt=0, description="share of the samples, relative to the sum of all weights")


class DataConfig(Section):
    """Where samples come from: one dataset (`path`) or several (`blend`)."""

    path: str | None = Field(
        "data/quickstart/shards",
        description="a folder written by `data_tools.pretokenize`, or the prefix of a Megatron `.bin`/`.idx` pair; "
        "`null` if `blend` is set",
    )
    blend: list[BlendEntry] | None = Field(
        None, min_length=1, description="several datasets with weights, instead of `path`"
    )
    validation_fraction: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of a `.bin`/`.idx` pair's documents, the last ones, that is held out for validation; folders "
        "have their own validation split",
    )
    sequence_length: int = Field(256, ge=1, description="tokens per sample")
    seed: int = Field(0, description="seed of the order of samples")
    answer_token: int | None = Field(
        None,
        ge=0,
        description="id of the token that separates question and answer: the loss counts only what follows it in the "
        "document; `null` counts all tokens; needs `path`",
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
            raise ValueError("set either data.path or data.blend; data.path=null goes with data.blend")
        if self.blend is not None and self.answer_token is not None:
            raise ValueError(f"data.answer_token={self.answer_token} needs data.path; it does not go with data.blend")
        return self

    @property
    def paths(self) -> list[str]:
        """The paths of all datasets."""
        return [entry.path for entry in self.blend or []] if self.path is None else [self.path]


class BatchRampConfig(Section):
    """A batch that grows in equal steps from `start` to `train.global_batch_size`."""

    start: int = Field(ge=1, description="samples of the first global batch")
    increment: int = Field(ge=1, description="samples that each step of the ramp adds")
    samples: int = Field(ge=1, description="samples after which the batch has reached `train.global_batch_size`")


class TrainConfig(Section):
    """Length of the run, batch sizes, validation and checkpoints."""

    steps: int = Field(300, ge=0, description="number of optimizer steps")
    seed: int = Field(0, description="seed of the initial weights")
    global_batch_size: int = Field(
        16,
        ge=1,
        description="samples per step over all micro-batches and replicas; a multiple of `micro_batch_size` times the "
        "number of replicas",
    )
    batch_ramp: BatchRampConfig | None = Field(
        None, description="start with smaller global batches; `null` uses `global_batch_size` from the first step on"
    )
    micro_batch_size: int = Field(2, ge=1, description="samples per micro-batch of one replica")
    evaluation_interval: int = Field(100, ge=0, description="steps between validations; 0 validates only at the end")
    evaluation_samples: int = Field(64, ge=0, description="samples per validation; 0 turns validation off")
    checkpoint_interval: int = Field(100, ge=0, description="steps between checkpoints; 0 saves only at the end")
    keep_last: int | None = Field(3, ge=1, description="number of newest checkpoints to keep; `null` keeps all")
    keep_every: int | None = Field(
        None, ge=1, description="also keep every checkpoint whose step is a multiple of this; `null` keeps no others"
    )
    max_consecutive_skips: int = Field(
        10,
        ge=1,
        description="skipped updates in a row, because of a loss or gradient that is not finite, after which the run stops",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="return to the newest checkpoint, and continue with new samples, if the loss exceeds this many times "
        "its recent median; `null` never returns",
    )
    log_interval: int = Field(10, ge=1, description="steps between console lines, and between numbers from all stages")
    compile: bool = Field(
        False,
        description="compile parts of each layer with `torch.compile`; needs a C++ compiler (CPU) or Triton (GPU)",
    )

    @model_validator(mode="after")
    def _ramp_arrives(self) -> TrainConfig:
        ramp = self.batch_ramp
        if ramp is not None and (
            ramp.start >= self.global_batch_size or (self.global_batch_size - ramp.start) % ramp.increment
        ):
            raise ValueError(
                f"train.batch_ramp: from start={ramp.start} in steps of increment={ramp.increment} the batch does not reach "
                f"train.global_batch_size={self.global_batch_size}"
            )
        return self


class CheckpointConfig(Section):
    """How checkpoints are written. `train` says when to write them and which to keep."""

    asynchronous: bool = Field(
        False,
        description="write in the background, from a copy in host memory of 12 bytes per parameter, divided among ranks",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="what the run does when it cannot write a checkpoint or a record, as on a full disk"
    )


class OptimizerConfig(Section):
    """The optimizer and its learning rate. The defaults are the paper's settings."""

    name: OptimizerName = Field("adamw", description="update rule")
    schedule: LearningRateName = Field(
        "cosine", description="course of the learning rates from the end of the warm-up to `min_lr`"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of all parameters but routers")
    router_lr: float = Field(
        1e-2, gt=0, description="peak learning rate of routers, chunk summaries and dynamic connection weights"
    )
    min_lr: float = Field(
        1e-6, ge=0, description="final value of `lr`; `router_lr` falls by the same factor, `min_lr / lr`"
    )
    warmup_steps: int = Field(200, ge=0, description="steps over which learning rates rise linearly to their peak")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices; norms, embeddings and routers have none"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95), strict=False, description="decay rates of AdamW's two moments, in [0, 1)"
    )
    eps: float = Field(1e-8, gt=0, description="term that AdamW adds to the denominator of an update")
    max_grad_norm: float = Field(
        1.0, gt=0, description="global gradient norm above which gradients are scaled down to it"
    )

    @model_validator(mode="after")
    def _ordered(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr} is above optimizer.lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        return self


class ParallelConfig(Section):
    """How the model and its optimizer are divided among processes.

    The number of processes divided by `pipeline_stages` is the number of data-parallel replicas.
    """

    pipeline_stages: int = Field(1, ge=1, description="number of pipeline stages, at most one per decoder layer")
    topology: Literal["stages_together", "replicas_together"] = Field(
        "stages_together",
        description="which processes share a host: neighbouring stages of a replica, or the replicas of a stage",
    )
    zero_stage: Literal[0, 1] = Field(
        0, description="1 divides optimizer states and master weights among the replicas of a stage (ZeRO-1)"
    )
    stage_layers: list[int] | None = Field(
        None,
        description="number of decoder layers of each stage, such as `[5, 6, 5]`; `null` divides them by `balance`",
    )
    balance: Literal["compute", "memory"] = Field(
        "compute", description="what the stages share evenly, unless `stage_layers` is set"
    )
    activation_checkpointing: bool = Field(
        False, description="store only the input of each layer, and compute its activations again in the backward pass"
    )


class PipelineConfig(Section):
    """How payloads travel between stages."""

    schedule: ScheduleName = Field(
        "1f1b",
        description="order of forward and backward passes: `1f1b` alternates them, with transfers that overlap the "
        "computation; `stock` is DeepSpeed's own, with blocking transfers",
    )
    engine: Literal["overlap", "stock"] = Field(
        "overlap",
        description="`overlap` transfers payloads while stages compute; `stock` is DeepSpeed's, with its schedule. If either "
        "`engine` or `schedule` is given, the other follows",
    )
    extra_in_flight: int = Field(
        1,
        ge=0,
        description="micro-batches in flight beyond those that 1F1B needs, for each boundary downstream; they hide transfers "
        "and cost memory (`1f1b`)",
    )
    wire_dtype: Literal["bf16"] | None = Field(
        None, description="type of payloads and their gradients between stages; `null` uses that of `precision`"
    )
    timeout: float = Field(
        600.0, gt=0, le=1e6, description="seconds without progress after which a stage ends the job (hang detection)"
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in the engine that runs the given schedule, or the first schedule that the given engine runs."""
        if not isinstance(values, dict) or ("schedule" in values) == ("engine" in values):
            return values
        if "schedule" in values:
            schedule = values["schedule"]
            known = isinstance(schedule, str) and schedule in SCHEDULES
            return {**values, "engine": SCHEDULES[schedule].engine} if known else values
        names = [cls.model_fields["schedule"].default, *SCHEDULES]
        fitting = [name for name in names if SCHEDULES[name].engine == values["engine"]]
        return {**values, "schedule": fitting[0]} if fitting else values

    @model_validator(mode="after")
    def _engine_runs_schedule(self) -> PipelineConfig:
        engine = SCHEDULES[self.schedule].engine
        if engine != self.engine:
            raise ValueError(
                f"pipeline.engine={self.engine} does not run pipeline.schedule={self.schedule}; set pipeline.engine={engine}, "
                "or leave one of the two out"
            )
        return self


class MonitorConfig(Section):
    """What a run records beside its losses."""

    router_interval: int = Field(100, ge=0, description="steps between pictures of what layers read; 0 draws none")
    router_layer: int | None = Field(
        None, ge=0, description="layer whose heads are drawn one by one, counted from 0; `null` takes the last layer"
    )
    peak_flops: float | None = Field(
        None,
        gt=0,
        description="peak FLOP/s of one device, for `speed/mfu`; `null` measures it at the start",
    )


class Config(Section):
    """The configuration of one run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    monitor: MonitorConfig = MonitorConfig()
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32",
        description="type of weights and activations; gradient accumulation, moments and master weights are never below "
        "float32; `fp64` is for equality tests",
    )

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
                f"whose sum is {layers} (model.num_hidden_layers)"
            )
        return self
