"""What keeps deep and wide models stable: ``model.numerics``."""

from __future__ import annotations

from pydantic import Field

from lime_dist.config.sections.base import Section


class NumericsConfig(Section):
    """Normalised queries and keys, bounded logits, and scales that follow depth and width; for every architecture."""

    qk_norm: bool = Field(
        False,
        description="RMSNorm of every head's queries and keys before their rotation, with weights that the heads of a layer share; "
        "for scores of attention that grow during training",
    )
    logit_softcap: float | None = Field(
        None,
        gt=0,
        description="bound c of the logits, which become c · tanh(logit / c); for logits that grow; `null`: no bound",
    )
    residual_scale: float = Field(
        1.0,
        gt=0,
        description="factor of the outputs of attention and SwiGLU; below 1 for deep models whose residual stream grows",
    )
    base_hidden_size: int | None = Field(
        None,
        ge=1,
        description="width of the model for which learning rate and initial values were tuned (µP); those of matrices, and tied logits, "
        "are scaled to `hidden_size`; `null`: they are not",
    )
    base_num_hidden_layers: int | None = Field(
        None,
        ge=1,
        description="depth of the model for which the learning rate was tuned (depth-µP); outputs of attention and SwiGLU are scaled to "
        "`num_hidden_layers`; `null`: they are not",
    )
