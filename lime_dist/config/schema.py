"""The configuration of a run: typed, frozen sections that reject unknown keys and impossible values.

Import sections from here. Every key has a description; ``docs/configuration.md`` is made from them (`lime_dist.config.page`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from lime_dist.config.registry import SCHEDULES, SINKS, choice_of
from lime_dist.config.sections.base import Section, UserPath
from lime_dist.config.sections.data import BlendEntry, DataConfig
from lime_dist.config.sections.model import (
    DEPTH_KEYS,
    HISTORY_KEYS,
    ROUTER_KEYS,
    ROUTES_KEYS,
    HistoryConfig,
    HyperConfig,
    LimeConfig,
    ModelConfig,
)
from lime_dist.config.sections.numerics import NumericsConfig
from lime_dist.config.sections.optimizer import OptimizerConfig
from lime_dist.config.sections.parallel import Checkpointing, ParallelConfig, PipelineConfig
from lime_dist.config.sections.rope import RopeScalingConfig
from lime_dist.config.sections.train import BatchRampConfig, CheckpointConfig, TrainConfig

__all__ = [
    "BatchRampConfig",
    "BlendEntry",
    "CheckpointConfig",
    "Checkpointing",
    "Config",
    "DEPTH_KEYS",
    "DataConfig",
    "HISTORY_KEYS",
    "HistoryConfig",
    "HyperConfig",
    "LimeConfig",
    "ModelConfig",
    "MonitorConfig",
    "NumericsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineConfig",
    "ROUTER_KEYS",
    "ROUTES_KEYS",
    "RopeScalingConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
]


if TYPE_CHECKING:
    SinkName = str
else:
    SinkName = choice_of(SINKS)


class RunConfig(Section):
    """The folder of the run."""

    directory: UserPath = Field(
        "runs/default",
        description="folder for checkpoints, metrics and TensorBoard files; if it holds a checkpoint, the run resumes. "
        "`~` and `$NAME` are expanded in every path",
    )
    start_from: UserPath | None = Field(
        None,
        description="checkpoint of another run with which a new run starts: its run folder, for the newest one, or `RUN@STEP`. "
        "A run whose folder holds a checkpoint resumes from that one",
    )
    start_weights_only: bool = Field(
        False,
        description="take the weights alone from `start_from`, and begin at step 0 with new moments and the first samples; "
        "else optimizer state, step and position in the data too",
    )

    @model_validator(mode="after")
    def _has_a_start(self) -> RunConfig:
        if self.start_weights_only and self.start_from is None:
            raise ValueError("run.start_weights_only=true needs run.start_from")
        return self


class SampleTextsConfig(Section):
    """Texts that the model writes during training, for TensorBoard's text tab and the report."""

    prompts: list[str] = Field(min_length=1, description="beginnings that the model continues")
    interval: int = Field(500, ge=1, description="steps between samples")
    tokens: int = Field(
        48,
        ge=1,
        description="tokens of a continuation, at most. Each takes the first replica as long as a validation of its prompts; the other "
        "replicas wait",
    )
    temperature: float = Field(
        0.0, ge=0, description="0 takes the most likely token; higher values draw tokens at random"
    )


class MonitorConfig(Section):
    """What a run records beside its losses."""

    router_interval: int = Field(
        100,
        ge=0,
        description="steps between pictures of what layers read, which take a micro-batch of validation samples where weights depend on "
        "the token; 0 draws none",
    )
    router_layer: int | None = Field(
        None,
        ge=0,
        description="layer whose heads or reads are drawn one by one, counted from 0; `null` takes the last layer",
    )
    peak_flops: float | None = Field(
        None,
        gt=0,
        description="peak FLOP/s of one device, for `speed/mfu`; `null` measures it at the start",
    )
    straggler_share: float = Field(
        0.25,
        gt=0,
        description="a rank is slow if its computation takes longer by more than this share than the median of the ranks of its stage (of two: "
        "than the other; with one replica: of all stages, by their FLOPs)",
    )
    straggler_minutes: float = Field(5.0, ge=0, description="minutes after which a rank that stays slow is named")
    sinks: list[SinkName] = Field(
        [], description="dashboards that also get the metrics; each needs the extra of its name, such as `.[wandb]`"
    )
    samples: SampleTextsConfig | None = Field(
        None, description="write sample texts during training; `null` writes none"
    )
    project: str = Field("lime_dist", min_length=1, description="the project in `sinks`; an experiment in MLflow")

    @field_validator("sinks")
    @classmethod
    def _each_once(cls, sinks: list[str]) -> list[str]:
        if twice := {name for name in sinks if sinks.count(name) > 1}:
            raise ValueError(f"monitor.sinks has {', '.join(sorted(twice))} twice")
        return sinks


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
    def _can_compile(self) -> Config:
        if self.train.compile is True and SCHEDULES[self.pipeline.schedule].splits_backward:
            raise ValueError(
                f"train.compile=true does not work with pipeline.schedule={self.pipeline.schedule}: the backward pass of a compiled "
                "graph computes all of its gradients at once; leave out train.compile, or choose another schedule"
            )
        return self

    @model_validator(mode="after")
    def _can_offload(self) -> Config:
        schedule = self.pipeline.schedule
        if self.parallel.offload_history and (self.parallel.parts_per_stage > 1 or SCHEDULES[schedule].is_blocking):
            raise ValueError(
                f"parallel.offload_history=true does not work with pipeline.schedule={schedule}: it needs a schedule with one part a stage, "
                "whose transfers overlap the computation; leave it out, or set pipeline.schedule=1f1b or zero_bubble"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        layers, stages = self.model.num_hidden_layers, self.parallel.pipeline_stages
        virtual, parts = self.parallel.virtual_stages, self.parallel.parts
        if virtual > 1 and not SCHEDULES[self.pipeline.schedule].holds_parts:
            raise ValueError(
                f"parallel.virtual_stages={virtual} does not work with pipeline.schedule={self.pipeline.schedule}, whose stages hold one "
                "part each; set pipeline.schedule=interleaved, or parallel.virtual_stages=1"
            )
        if parts > layers >= stages:
            raise ValueError(
                f"parallel.pipeline_stages={stages} × parallel.virtual_stages={virtual} is more than model.num_hidden_layers={layers}; "
                "every part needs a layer"
            )
        if stages > layers:
            raise ValueError(
                f"parallel.pipeline_stages={stages} is more than model.num_hidden_layers={layers}; "
                "every stage needs a layer"
            )
        by_stage = self.parallel.activation_checkpointing
        if isinstance(by_stage, list) and len(by_stage) != stages:
            raise ValueError(
                f"parallel.activation_checkpointing={by_stage} must have {stages} values (parallel.pipeline_stages)"
            )
        watched = self.monitor.router_layer
        if watched is not None and watched >= layers:
            raise ValueError(
                f"monitor.router_layer={watched} is past the last layer, {layers - 1} (model.num_hidden_layers={layers})"
            )
        by_hand = self.parallel.stage_layers
        if by_hand is not None and (len(by_hand) != parts or sum(by_hand) != layers or min(by_hand) < 1):
            counted = "parallel.pipeline_stages" + (" × parallel.virtual_stages" if parts > stages else "")
            raise ValueError(
                f"parallel.stage_layers={by_hand} must be {parts} positive numbers ({counted}) "
                f"whose sum is {layers} (model.num_hidden_layers)"
            )
        return self
