"""The optimizer and its learning rates: ``optimizer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lime_dist.config.registry import LEARNING_RATES, OPTIMIZERS, choice_of
from lime_dist.config.sections.base import Section

if TYPE_CHECKING:
    OptimizerName = str
    LearningRateName = str
else:
    OptimizerName = choice_of(OPTIMIZERS)
    LearningRateName = choice_of(LEARNING_RATES)


class OptimizerConfig(Section):
    """The optimizer and its learning rate. The defaults are the paper's settings."""

    name: OptimizerName = Field(
        "adamw",
        description="update rule; `muon` orthogonalises the momentum of the projections of attention and MLP, and uses AdamW for the rest",
    )
    schedule: LearningRateName = Field(
        "cosine",
        description="course of the learning rates after the warm-up: to `min_lr` along half a cosine or a straight line (`linear`); "
        "`wsd` stays at the peak and decays at the end of the run; `constant` stays",
    )
    decay_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="`schedule: wsd`: the share of `train.steps`, at the end, over which learning rates decay",
    )
    decay_form: Literal["linear", "cosine", "sqrt"] = Field(
        "sqrt",
        description="`schedule: wsd`: form of the decay; with `sqrt`, 1 − √x of the way to `min_lr` is left after the part x of it",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of all parameters but routers")
    router_lr: float = Field(
        1e-2, gt=0, description="peak learning rate of routers, chunk summaries and dynamic connection weights"
    )
    min_lr: float = Field(
        1e-6,
        ge=0,
        description="final value of `lr`; `router_lr` falls by the same factor, `min_lr / lr`. By default `lr` if that is smaller",
    )
    warmup_steps: int = Field(200, ge=0, description="steps over which learning rates rise linearly to their peak")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices; norms, embeddings and routers have none"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95), strict=False, description="decay rates of AdamW's two moments, in [0, 1)"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="decay rate of the momentum of `muon`'s matrices")
    eps: float = Field(1e-8, gt=0, description="term that AdamW adds to the denominator of an update")
    max_grad_norm: float = Field(
        1.0, gt=0, description="global gradient norm above which gradients are scaled down to it"
    )

    @model_validator(mode="before")
    @classmethod
    def _small_lr(cls, values: Any) -> Any:
        """The default of ``min_lr`` does not forbid a smaller ``lr``."""
        if isinstance(values, dict) and "min_lr" not in values:
            lr = values.get("lr")
            if isinstance(lr, float) and 0 < lr < cls.model_fields["min_lr"].default:
                return {**values, "min_lr": lr}
        return values

    @model_validator(mode="after")
    def _ordered(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr} is above optimizer.lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        return self
