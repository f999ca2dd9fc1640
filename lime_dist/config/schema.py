"""The typed, frozen sections of a run's configuration; an unknown key or an impossible value is an error."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunConfig(Section):
    directory: str = "runs/default"


class HistoryConfig(Section):
    """Which entries a layer reads (design: history policies)."""

    policy: Literal["full"] = "full"


class LimeConfig(Section):
    """Layer-Integrated Memory, arXiv 2502.09245."""

    routes: Literal["kv"] = "kv"
    router_init: Literal["uniform", "identity"] = "uniform"
    history: HistoryConfig = HistoryConfig()


class ModelConfig(Section):
    """Shape of the decoder; the names are those of Hugging Face's LLaMA configuration."""

    architecture: Literal["llama", "lime"] = "lime"
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

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads


class DataConfig(Section):
    path: str = "data/quickstart/shards"
    sequence_length: int = Field(256, ge=1)
    seed: int = 0


class TrainConfig(Section):
    steps: int = Field(300, ge=0)
    seed: int = 0
    global_batch_size: int = Field(16, ge=1, description="samples a step, over all micro-batches and replicas")
    micro_batch_size: int = Field(2, ge=1, description="samples a micro-batch of one replica")
    evaluation_interval: int = Field(100, ge=0, description="steps between validations; 0: only at the end")
    evaluation_samples: int = Field(64, ge=0, description="validation samples; 0: no validation")
    checkpoint_interval: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    log_interval: int = Field(10, ge=1, description="steps between console lines")


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
    zero_stage: Literal[0, 1] = 0
    stage_layers: list[int] | None = Field(None, description="decoder layers per stage, by hand")
    activation_checkpointing: bool = False


class Config(Section):
    """One run. ``precision``: of weights and activations; accumulation, moments and masters are never below float32.

    ``fp64`` is for proofs: the equality tests run whole training steps in it.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        layers, stages = self.model.num_hidden_layers, self.parallel.pipeline_stages
        if stages > layers:
            raise ValueError(
                f"parallel.pipeline_stages={stages} is more than model.num_hidden_layers={layers}; "
                "every stage needs a layer"
            )
        by_hand = self.parallel.stage_layers
        if by_hand is not None and (len(by_hand) != stages or sum(by_hand) != layers or min(by_hand) < 1):
            raise ValueError(
                f"parallel.stage_layers={by_hand} must be {stages} positive numbers (parallel.pipeline_stages) "
                f"that add up to {layers} (model.num_hidden_layers)"
            )
        return self
