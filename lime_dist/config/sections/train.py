"""Steps, batches, validation and checkpoints: ``train`` and ``checkpoint``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lime_dist.config.sections.base import Section

EVALUATION_SAMPLES = 64
"""Samples per validation if ``train.evaluation_samples`` is null and nothing else is known of the run."""


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
    evaluation_samples: int | None = Field(
        None,
        ge=0,
        description="samples per validation, a multiple of `micro_batch_size` times the number of replicas; 0 turns validation "
        "off; `null` takes about 64, as the multiples and the split allow",
    )
    checkpoint_interval: int = Field(100, ge=0, description="steps between checkpoints; 0 saves only at the end")
    keep_last: int | None = Field(3, ge=1, description="number of newest checkpoints to keep; `null` keeps all")
    keep_every: int | None = Field(
        None, ge=1, description="also keep every checkpoint whose step is a multiple of this; `null` keeps no others"
    )
    keep_best: bool = Field(
        False,
        description="save whenever the validation loss is the lowest so far, and always keep that checkpoint; "
        "`checkpoints/best` names it",
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
    z_loss: float = Field(
        0.0,
        ge=0,
        description="weight w of the z-loss: the training loss has w · (log Σ exp(logits))² more for every token that counts; 1e-4 for "
        "logits that drift",
    )
    log_interval: int = Field(10, ge=1, description="steps between console lines, and between numbers from all stages")
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="compile parts of each layer with `torch.compile`, which fuses their elementwise operations; needs a C++ compiler "
        "(CPU) or Triton (GPU). `auto` compiles on CUDA where torch can, and says so where it cannot",
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

    @property
    def evaluation_samples_or_default(self) -> int:
        """Samples per validation, as far as the configuration alone says; a run may use fewer or more if it is null."""
        return EVALUATION_SAMPLES if self.evaluation_samples is None else self.evaluation_samples


class CheckpointConfig(Section):
    """How checkpoints are written. `train` says when to write them and which to keep."""

    asynchronous: bool = Field(
        False,
        description="write in the background, from a copy in host memory of 12 bytes per parameter, divided among ranks",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="what the run does when it cannot write a checkpoint or a record, as on a full disk"
    )
