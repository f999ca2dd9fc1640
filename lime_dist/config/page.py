"""The page docs/configuration.md, made from the schema: every key with its type, default and description."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lime_dist.commands import CommandParser
from lime_dist.config.registry import Registry
from lime_dist.config.schema import HISTORY_KEYS, Config, HistoryConfig
from lime_dist.errors import run_command

EXAMPLE = """example:
  python -m lime_dist.config.page > docs/configuration.md"""
INTRODUCTION = """# Configuration

A YAML file describes a run. A key that the file leaves out has its default. The command line overrides the file with
`section.key=value`; values are YAML. An unknown key or an impossible value ends the command with one line that names the key.
The run writes all keys, as it uses them, to `config.yaml` in its folder.

This page is made from the descriptions in `lime_dist/config/sections/`:

```bash
python -m lime_dist.config.page > docs/configuration.md
```
"""
TABLE_HEAD = "| key | type | default | description |\n|---|---|---|---|"
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", types.NoneType: "`null`"}
BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Print docs/configuration.md: every configuration key with its type, default and description.",
        epilog=EXAMPLE,
    )
    parser.parse_args(arguments)
    print(make_page(), end="")


def make_page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRODUCTION]
    for name, section in sections():
        rows = [_row(key, field) for key, field in section.model_fields.items() if not _is_section(field.annotation)]
        if rows:
            title = f"`{name}`" if name else "Top level"
            parts += [f"## {title}\n", f"{_markdown(section.__doc__ or '')}\n", TABLE_HEAD, *rows, ""]
        if section is HistoryConfig:
            parts += [*_history_defaults(), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def sections(section: type[BaseModel] = Config, name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The dotted names of all sections and their classes; ``name[]`` is an item of a list."""
    yield name, section
    for key, field in section.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        for option in _options(field.annotation):
            if _is_section(option):
                yield from sections(option, dotted)
            elif get_origin(option) is list and _is_section(get_args(option)[0]):
                yield from sections(get_args(option)[0], f"{dotted}[]")


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    if isinstance(field.default, str):
        default = f"`{field.default}`"
    cells = [f"`{key}`", _type_text(field), default, _markdown(field.description or "")]
    return f"| {' | '.join(cells)} |"


def _type_text(field: FieldInfo) -> str:
    """Such as "integer ≥ 1 or `null`", or the choices."""
    for known in field.metadata:
        if isinstance(known, Registry):
            return _choices(known)
    bounds = [f"{sign} {getattr(bound, kind.__name__.lower()):,.10g}" for bound in field.metadata
              for kind, sign in BOUNDS.items() if isinstance(bound, kind)]  # fmt: skip
    names: list[str] = []
    for option in _options(field.annotation):
        if get_origin(option) is Annotated:
            option = get_args(option)[0]
        if get_origin(option) is Literal:
            names.append(_choice_text(option))
        elif get_origin(option) is list:
            (item,) = get_args(option)
            if registry := next((one for one in get_args(item) if isinstance(one, Registry)), None):
                names.append(f"list of {_choices(registry)}")
                continue
            if len(options := _options(item)) > 1:
                names.append(f"list of {' or '.join(_choice_text(one) for one in options)}")
                continue
            names.append(f"list of {'sections' if _is_section(item) else TYPE_NAMES[item] + 's'}")
        elif get_origin(option) is dict:
            names.append("paths by name")
        elif get_origin(option) is tuple:
            names.append(f"{len(get_args(option))} {TYPE_NAMES[get_args(option)[0]]}s")
        elif _is_section(option):
            names.append("section")
        else:
            number = option in (int, float)
            names.append(" ".join([TYPE_NAMES[option], ", ".join(bounds) if number else ""]).strip())
    return " or ".join(names)


def _choice_text(option: Any) -> str:
    """A type without bounds."""
    if get_origin(option) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(option))
    return TYPE_NAMES[option]


def _choices(registry: Registry[Any]) -> str:
    return ", ".join(f"`{name}`" for name in registry)


def _history_defaults() -> list[str]:
    """A table of the keys of each policy."""
    keys = list(dict.fromkeys(key for policy in HISTORY_KEYS.values() for key in policy))
    rows = [
        f"| `{policy}` | {' | '.join(str(defaults.get(key, '–')) for key in keys)} |"
        for policy, defaults in HISTORY_KEYS.items()
    ]
    head = f"| policy | {' | '.join(f'`{key}`' for key in keys)} |\n|---{'|---' * len(keys)}|"
    return ["A key that is `null` has its policy's default:\n", head, *rows]


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _markdown(text: str) -> str:
    """A docstring or description with one line per paragraph and Markdown's code marks."""
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


if __name__ == "__main__":
    run_command(main)
