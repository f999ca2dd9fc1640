"""The base class of configuration sections, and the type of their paths."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from lime_dist.errors import LimeError
from lime_dist.paths import expand

EXPAND = {"expand paths": True}
"""The validation context of values that a user gives. Those of a checkpoint are not expanded again: they are the paths of its
run, perhaps on another machine."""


def _expanded(text: str, info: ValidationInfo) -> str:
    try:
        return expand(text) if info.context == EXPAND else text
    except LimeError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from None


UserPath = Annotated[str, AfterValidator(_expanded)]
"""A path in which ``~`` and variables of the environment are expanded."""


class Section(BaseModel):
    """Base class of all sections: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def without_null(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values without the keys whose ``null`` stands for a default. Unknown keys stay, so that they are refused: in
        ``{policy:chunked}``, which lacks a space, YAML sees the key ``policy:chunked`` and no value."""
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}
