"""How a run is spread over processes: ``parallel`` and ``pipeline``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from lime_dist.config.registry import SCHEDULES, choice_of
from lime_dist.config.sections.base import Section

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = choice_of(SCHEDULES)

Checkpointing = bool | Literal["selective"]
"""What a stage computes again in its backward pass: nothing, its layers, or the feed-forward halves of its layers."""


class ParallelConfig(Section):
    """How the model and its optimizer are divided among processes.

    The number of processes divided by `pipeline_stages` is the number of data-parallel replicas.
    """

    pipeline_stages: int = Field(1, ge=1, description="number of pipeline stages, at most one per decoder layer")
    virtual_stages: int = Field(
        1,
        ge=1,
        description="parts of the decoder that each stage holds (virtual pipeline stages): part v · `pipeline_stages` + s is on stage s. "
        "More parts shorten the time in which stages wait for the first and after the last micro-batch, and send more "
        "(`pipeline.schedule: interleaved`). With one stage there is one part",
    )
    topology: Literal["stages_together", "replicas_together"] = Field(
        "stages_together",
        description="which processes share a host: neighbouring stages of a replica, or the replicas of a stage",
    )
    zero_stage: Literal[0, 1] = Field(
        0, description="1 divides optimizer states and master weights among the replicas of a stage (ZeRO-1)"
    )
    stage_layers: list[int] | None = Field(
        None,
        description="number of decoder layers of each stage, such as `[5, 6, 5]`, with `virtual_stages` of each part; `null` divides "
        "them by `balance`",
    )
    balance: Literal["compute", "memory"] = Field(
        "compute", description="what the stages share evenly, unless `stage_layers` is set"
    )
    activation_checkpointing: Checkpointing | Literal["auto"] | list[Checkpointing] = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: `true` keeps only the input of each layer; "
        "`selective` keeps what attention and its projections need, and only the input of the MLP with its norm; `auto` chooses for each "
        "stage the first of `false`, `selective` and `true` with which it fits in the memory of its device; a list has a value for each "
        "stage",
    )
    offload_history: bool = Field(
        False,
        description="keep the layer histories of micro-batches that wait for their backward pass in host memory, all but three on each "
        "stage: early stages, which have more micro-batches in flight, need less device memory (`lime` and `attention_residuals`; no "
        "effect on other architectures)",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _known_checkpointing(cls, setting: Any) -> Any:
        each = setting if isinstance(setting, list) else [setting]
        if setting != "auto" and not all(isinstance(one, bool) or one == "selective" for one in each):
            raise ValueError(
                f"parallel.activation_checkpointing={setting} must be true, false, selective or auto, or a list with true, false or "
                "selective for each stage"
            )
        return setting

    @property
    def parts_per_stage(self) -> int:
        """Parts of the decoder that each stage holds. The parts of a single stage would follow each other: they are one."""
        return self.virtual_stages if self.pipeline_stages > 1 else 1

    def checkpointing_of(self, stage: int) -> Checkpointing:
        """``activation_checkpointing`` of a stage. While nothing is chosen (`pipeline.checkpointing_choice`), ``auto`` is false."""
        setting = self.activation_checkpointing
        if isinstance(setting, list):
            return setting[stage]
        return False if setting == "auto" else setting

    @property
    def parts(self) -> int:
        """Parts of the decoder on all stages."""
        return self.pipeline_stages * self.parts_per_stage


class PipelineConfig(Section):
    """How payloads travel between stages."""

    schedule: ScheduleName = Field(
        "1f1b",
        description="order of forward and backward passes: `1f1b` alternates them, with transfers that overlap the "
        "computation; `interleaved` does so with several parts a stage (`parallel.virtual_stages`); `zero_bubble` does so with one, and "
        "computes weight gradients apart, where a stage would be idle; `stock` is DeepSpeed's own, with blocking transfers",
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
        "and cost memory (`1f1b`, `zero_bubble`; with several parts a stage `interleaved` always has 1)",
    )
    deferred_weight_passes: int | None = Field(
        None,
        ge=0,
        description="most micro-batches whose weight gradients a stage holds back (`zero_bubble`); each keeps the inputs and output "
        "gradients of the stage's projections. `null`: s · (1 + `extra_in_flight`) on stage s, counted from 0",
    )
    wire_dtype: Literal["bf16", "fp8"] | None = Field(
        None,
        description="type of payloads and their gradients between stages; `fp8` sends history entries as float8 (e4m3) with a bf16 "
        "scale for every block of up to 128 elements, and everything else in the type of `precision`; `null` uses that of `precision` for all",
    )
    boundary: Literal["minimal", "entries"] = Field(
        "minimal",
        description="what of the layer history crosses stage boundaries: `entries` that later layers read, or the `minimal` "
        "number of entries and of partial mixtures, to which each stage adds its part (`routes: kv` with routers; the results are equal up to "
        "rounding). With `parallel.virtual_stages` entries cross, to each stage once",
    )
    transfer_ctas: int | None = Field(
        4,
        ge=1,
        le=64,
        description="most CTAs (thread blocks) that a transfer between stages occupies on a GPU, also while it waits for its peer "
        "(NCCL); `null` leaves the number to NCCL, which takes up to 16 over NVLink",
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
        if self.wire_dtype == "fp8" and not SCHEDULES[self.schedule].encodes_payloads:
            raise ValueError(
                f"pipeline.wire_dtype=fp8 does not work with pipeline.schedule={self.schedule}, whose engine sends only payloads "
                "of one floating-point type; choose another schedule, or set pipeline.wire_dtype=bf16"
            )
        return self
