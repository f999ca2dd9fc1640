"""Advice about a key that a configuration does not have: the valid key that was probably meant."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from lime_dist.config.schema import Config
from lime_dist.config.synonyms import NOTES, SYNONYMS, UNSUPPORTED


def advice(key: str) -> str:
    """What to write instead of an unknown dotted key.

    A name that other trainers use for one of our keys leads to that key. Otherwise the nearest is the one whose last part has the
    smallest edit distance, then the one whose whole name has.
    """
    given = key.lower().replace("-", "_")
    *sections, last = given.split(".")
    valid_keys = [(valid.rpartition(".")[2], valid) for valid in known_keys()]
    leaves = {leaf for leaf, _ in valid_keys}
    foreign = [name for name in reversed(sections) if name not in leaves]  # such as bf16 in bf16.enabled
    for name in ([f"{sections[-1]}.{last}"] if sections else []) + [last, *foreign]:
        if name in UNSUPPORTED:
            return UNSUPPORTED[name]
        if name in SYNONYMS:
            note = f" ({NOTES[name]})" if name in NOTES else ""
            return f"the nearest valid key is {SYNONYMS[name]}{note}"
        if same := [valid for leaf, valid in valid_keys if leaf == name]:
            return f"the nearest valid key is {min(same, key=lambda valid: edit_distance(given, valid))}"
    candidates = [*valid_keys, *((name, valid) for name, valid in SYNONYMS.items() if "." not in name)]
    _, nearest = min(candidates, key=lambda each: (edit_distance(last, each[0]), edit_distance(given, each[1])))
    return f"the nearest valid key is {nearest}"


def first_leaf(key: str, value: Any) -> tuple[str, Any]:
    """The first key with a value inside an unknown section, such as optim.lr for ``optim: {lr: 1}``."""
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key, value


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [section for option in get_args(annotation) for section in _sections_in(option)]
    return []


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn one word into the other (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]
