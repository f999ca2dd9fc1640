"""Configurations as flat dictionaries: one value by dotted key."""

from __future__ import annotations

import json
from typing import Any

from lime_dist.config.schema import Config


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections, and lists of sections, as one dictionary with dotted keys, such as data.blend.0.weight."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def flat_config(config: Config) -> dict[str, Any]:
    """The value of every key of a configuration."""
    return flattened(config.model_dump(mode="json"))


def shown(value: Any) -> str:
    """A value as one writes it in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


def changed_keys(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """By dotted key, the old and the new value of every key that differs; – for one that only the other configuration has."""
    old, new = flat_config(before), flat_config(after)
    return {
        key: (shown(old[key]) if key in old else "–", shown(new[key]) if key in new else "–")
        for key in dict.fromkeys((*old, *new))
        if key not in old or key not in new or old[key] != new[key]
    }
