"""Protects that only the package of the implementations compares registered names: everything else asks the object.

A new implementation is one file; it must not need a change elsewhere because a name is compared there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lime_dist.config.registry import ARCHITECTURES, CONNECTIONS, LEARNING_RATES, OPTIMIZERS, SCHEDULES
from lime_dist.config.schema import DEPTH_KEYS, ROUTER_KEYS, ROUTES_KEYS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ROOT / "pretrain.py",
    *(path for folder in ("lime_dist", "data_tools", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))),
]


def compared_strings(path: Path) -> set[str]:
    """Return string constants with which a file compares a value, or by which it looks one up in a literal dictionary.

    Comparisons are ``==``, ``!=``, ``in``, ``not in`` (also with the strings of a tuple, list, set or dictionary), ``match``
    and ``startswith``; look-ups are ``{…}[value]`` and ``{…}.get(value)``.
    """
    return {string for node in ast.walk(ast.parse(path.read_text())) for string in _compared(node)}


def _compared(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare):
        for operand in (node.left, *node.comparators):
            yield from _strings(operand)
    elif isinstance(node, ast.MatchValue):
        yield from _strings(node.value)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
        yield from _strings(node.value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "get" and isinstance(node.func.value, ast.Dict):
            yield from _strings(node.func.value)
        elif node.func.attr == "startswith":
            for argument in node.args:
                yield from _strings(argument)


def _strings(node: ast.expr) -> Iterator[str]:
    """Return a string constant, or those of a tuple, list, set or of a dictionary's keys."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from _strings(element)
    elif isinstance(node, ast.Dict):
        for key in filter(None, node.keys):
            yield from _strings(key)


def files_that_compare(names: set[str], *homes: str) -> list[str]:
    """Return files outside the ``homes`` (folders or files, relative to the repository) that compare a value with one of the names."""
    inside = tuple(ROOT / home for home in homes)
    return [
        f"{path.relative_to(ROOT)}: {', '.join(sorted(compared))}"
        for path in SOURCES
        if not any(path == home or home in path.parents for home in inside)
        and (compared := compared_strings(path) & names)
    ]


def test_architectures_are_compared_in_their_folders_only() -> None:
    """Also `lime`'s routes and routers. Modelling code is exempt: an export carries the code of its architecture."""
    modelling_code = [f"lime_dist/export/huggingface/{name}_lime.py" for name in ("key_value", "hidden", "hyper")]
    names = {*ARCHITECTURES, *ROUTES_KEYS, *ROUTER_KEYS, *DEPTH_KEYS} - {"none"}
    assert names == {
        "llama",
        "lime",
        "hyper",
        "gated_residual",
        "value_residual",
        "attention_residuals",
        "kv",
        "hidden",
        "static",
        "dynamic",
        "moda",
    }
    assert files_that_compare(names, "lime_dist/model/architectures", *modelling_code) == []


def test_connections_are_compared_in_their_package_only() -> None:
    assert {*CONNECTIONS} == {"free", "doubly_stochastic", "permutations"}
    assert files_that_compare({*CONNECTIONS}, "lime_dist/model/architectures/hyper/connections") == []


def test_schedules_are_compared_in_their_package_only() -> None:
    names = {*SCHEDULES, *(schedule.engine for schedule in SCHEDULES.values())}
    assert {"1f1b", "stock", "overlap"} <= names
    assert files_that_compare(names, "lime_dist/pipeline/schedules") == []


def test_optimizers_are_compared_in_their_package_only() -> None:
    assert "adamw" in OPTIMIZERS and "cosine" in LEARNING_RATES
    assert files_that_compare({*OPTIMIZERS}, "lime_dist/train/optimizers") == []
    assert files_that_compare({*LEARNING_RATES}, "lime_dist/train/learning_rates") == []


@pytest.mark.parametrize(
    "code",
    [
        "if schedule == 'stock': pass",
        "x = 1 if 'stock' != config.schedule else 2",
        "assert schedule in ('overlap', 'stock')",
        "x = schedule not in {'stock'}",
        "x = schedule in ['a', ('stock',)]",
        "x = {'stock': 1, 'overlap': 2}[schedule]",
        "x = {'stock': 1}.get(schedule, 0)",
        "x = schedule.startswith('stock')",
        "match schedule:\n    case 'stock': pass",
        "match schedule:\n    case 'other' | 'stock': pass",
        "x = [s for s in schedules if s.name == 'stock']",
    ],
)
def test_comparisons_are_found(tmp_path: Path, code: str) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert "stock" in compared_strings(path)


@pytest.mark.parametrize(
    "code", ["x = 'stock'", "f('stock')", "x = {'stock': 1}", "x['stock']", "@register('stock')\nclass A: pass"]
)
def test_other_uses_are_allowed(tmp_path: Path, code: str) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert compared_strings(path) == set()
