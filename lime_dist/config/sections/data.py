"""Where samples come from: ``data``."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from lime_dist.config.sections.base import Section, UserPath


class BlendEntry(Section):
    """One dataset of a blend."""

    path: UserPath = Field(description="a folder or a prefix, as in `data.path`")
    weight: float = Field(gt=0, description="share of the samples, relative to the sum of all weights")


class DataConfig(Section):
    """Where samples come from: one dataset (`path`) or several (`blend`)."""

    path: UserPath | None = Field(
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
    validation: dict[str, UserPath] = Field(
        {},
        description="more validation sets by name, such as `{wiki: PATH, code: PATH}`, each with its own curve: the validation "
        "split of a folder; all of a folder without one, or of a `.bin`/`.idx` pair, that the run does not train on",
    )
    sequence_length: int = Field(256, ge=1, description="tokens per sample")
    seed: int = Field(0, description="seed of the order of samples")
    accept_change: bool = Field(
        False,
        description="resume although the training data, or the weights of `blend`, differ from those of the checkpoint; the "
        "run says what is read again and what is left out",
    )
    answer_token: int | None = Field(
        None,
        ge=0,
        description="id of the token that separates question and answer: the loss counts only what follows it in the "
        "document; `null` counts all tokens; needs `path`",
    )
    document_mask: bool = Field(
        False,
        description="attention stops at the beginning of a document within a sample, positions restart there, and the loss does not count "
        "the prediction of a document's first token from the document before; needs documents that end with an eos token",
    )
    eos_token: int | None = Field(
        None,
        ge=0,
        description="id of the token that ends every document of a `.bin`/`.idx` pair, for `document_mask` and `answer_token`; `null`: "
        "folders name it themselves",
    )

    @field_validator("validation")
    @classmethod
    def _names_of_curves(cls, validation: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in validation if not re.fullmatch(r"\w[\w-]*", name)]:
            raise ValueError(f"data.validation: {wrong[0]!r} cannot name a curve; use letters, digits, _ and -")
        return validation

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
        if self.eos_token is not None and not self.document_mask and self.answer_token is None:
            raise ValueError(
                f"data.eos_token={self.eos_token} has no meaning without data.document_mask or data.answer_token"
            )
        return self

    @property
    def paths(self) -> list[str]:
        """The paths of all datasets."""
        return [entry.path for entry in self.blend or []] if self.path is None else [self.path]
