"""How the rotary embedding is scaled: ``model.rope_scaling``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lime_dist.config.sections.base import Section

ROPE_KEYS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": None,
    },
}
"""The keys of each ``rope_type``, with their defaults; None: the key must be given."""


class RopeScalingConfig(Section):
    """How the rotary embedding's frequencies are scaled for sequences longer than those of an earlier training.

    Pair i of the d elements of a head turns by θ^(−2i/d) radians per token; its wavelength is 2π over that, in tokens.
    """

    rope_type: Literal["default", "linear", "llama3"] = Field(
        "default",
        description="`default` scales nothing; `linear` divides all frequencies by `factor`; `llama3` divides those of long "
        "wavelengths, as Llama 3.1 does",
    )
    factor: float | None = Field(None, ge=1, description="divisor of the frequencies (`linear`, `llama3`)")
    low_freq_factor: float | None = Field(
        None,
        gt=0,
        description="wavelengths above `original_max_position_embeddings` over this are divided by `factor` (`llama3`, 1 by default)",
    )
    high_freq_factor: float | None = Field(
        None,
        gt=0,
        description="wavelengths below `original_max_position_embeddings` over this stay as they are; between the two, "
        "frequencies are interpolated (`llama3`, 4 by default)",
    )
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="sequence length of the earlier training (`llama3`)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill in the type's defaults, so that a resolved configuration shows every number."""
        if not isinstance(values, dict) or not isinstance(values.get("rope_type", ""), str):
            return values
        defaults = ROPE_KEYS.get(values.get("rope_type", "default"), {})
        return {**defaults, **cls.without_null(values)}

    @model_validator(mode="after")
    def _keys_fit(self) -> RopeScalingConfig:
        own = ROPE_KEYS[self.rope_type]
        for key in ROPE_KEYS["llama3"]:
            value = getattr(self, key)
            if value is not None and key not in own:
                raise ValueError(
                    f"model.rope_scaling.{key}={value} is not a key of rope_type: {self.rope_type}; leave it out, or set the "
                    f"whole section at once: 'model.rope_scaling={{rope_type: {self.rope_type}, …}}'"
                )
            if value is None and key in own:
                raise ValueError(f"model.rope_scaling.rope_type={self.rope_type} needs model.rope_scaling.{key}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={low} must be less than model.rope_scaling.high_freq_factor={high}"
            )
        return self
