"""``model.rope_scaling`` in the config.json of a Hugging Face model, which has two names and places for it.

transformers 4 reads ``rope_scaling`` beside ``rope_theta``; transformers 5 writes ``rope_parameters`` with ``rope_theta`` in it,
and reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from lime_dist.config.schema import RopeScalingConfig
from lime_dist.errors import LimeError

TYPES = get_args(RopeScalingConfig.model_fields["rope_type"].annotation)


def described(scaling: RopeScalingConfig) -> dict[str, Any]:
    """The value of ``rope_scaling`` or ``rope_parameters``; empty if nothing is scaled."""
    return {} if scaling.factor is None else scaling.model_dump(exclude_none=True)


def supported_length(sequence_length: int, scaling: RopeScalingConfig) -> int:
    """``max_position_embeddings``: the sequence length of training, or the longer one that the scaling is for."""
    return max(sequence_length, int((scaling.factor or 0) * (scaling.original_max_position_embeddings or 0)))


def read_scaling(source: str, values: Mapping[str, Any]) -> RopeScalingConfig:
    """The scaling that the keys of a config.json describe.

    Args:
        source: names the file in errors.

    Raises:
        LimeError: names the type or the key that the trainer does not have.
    """
    given = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rope_type = given.pop("rope_type", None) or given.get("type") or "default"
    if rope_type not in TYPES:
        raise LimeError(f"{source}: rope_type={rope_type} is not supported, only {', '.join(TYPES)}")
    if given.get("partial_rotary_factor") not in (None, 1.0):
        raise LimeError(
            f"{source}: partial_rotary_factor={given['partial_rotary_factor']} is not supported: the trainer rotates whole heads"
        )
    beside = {"type", "rope_theta", "partial_rotary_factor"}
    try:
        return RopeScalingConfig.model_validate(
            {"rope_type": rope_type, **{key: value for key, value in given.items() if key not in beside}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("rope_scaling", *map(str, first["loc"])))
        raise LimeError(f"{source}: {key}={first['input']!r} is not supported: {first['msg']}") from None
