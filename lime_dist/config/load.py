"""Read a configuration from YAML and ``section.key=value`` overrides.

An error is one line with the key, its value, where it was given, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lime_dist.config.schema import Config
from lime_dist.config.sections.base import EXPAND
from lime_dist.config.unknown_keys import advice, first_leaf
from lime_dist.errors import LimeError
from lime_dist.paths import user_path


class _Loader(yaml.SafeLoader):
    """A safe loader that reads ``1e-3`` as a number, unlike YAML 1.1, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_FLOAT = (
    r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file, or None to start from the defaults.
        overrides: ``section.key=value`` items, applied in order; values are YAML.

    Raises:
        LimeError: the file cannot be read, or a key or value is invalid.
    """
    values = {} if path is None else _read_yaml(user_path(str(path)))
    for item in overrides:
        _apply_override(values, item)
    return make_config(values, "the defaults" if path is None else str(path), overrides)


def make_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Validate nested values against the schema.

    Args:
        values: sections by name.
        source: names the origin of the values in error messages, such as the path of a file.
        overrides: the ``section.key=value`` items among the values; errors in them name the command line instead.

    Raises:
        LimeError: a key or value is invalid.
    """
    try:
        return Config.model_validate(values, context=EXPAND)
    except ValidationError as error:
        errors = error.errors()  # a misspelt key says more than the required one that is then missing
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        key = [str(part) for part in first["loc"]]
        for item in overrides:
            given = item.partition("=")[0].split(".")
            if not first["loc"] or given[: len(key)] == key[: len(given)]:
                source = "the command line"
        raise LimeError(_explain(first, source)) from None


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML. ``load_config`` reads it back as an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LimeError(
            f"cannot read the configuration {path}: {error.strerror}; give --config an existing YAML file"
        ) from None
    except UnicodeDecodeError:
        raise LimeError(f"the configuration {path} is not UTF-8 text") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: from the constructors of dates and numbers
        raise LimeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise LimeError(f"{path} must contain sections (run:, model:, …), not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise LimeError(f"cannot read the override {item!r}; write section.key=value, such as train.steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise LimeError(f"cannot read the value of {key}: {text!r} is not valid YAML") from None
    parts = key.split(".")
    section = values
    for depth, part in enumerate(parts[:-1]):
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise LimeError(f"{item!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        section = inner
    section[parts[-1]] = value


def _explain(error: ErrorDetails, source: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        key, value = first_leaf(key, value)
        return f"unknown key {key}={value!r} in {source}; {advice(key)}"
    if error["type"] == "value_error":  # raised by the schema's validators, which name the keys themselves
        return f"{error['msg'].removeprefix('Value error, ')} (in {source})"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}={value!r} in {source}: {message}"
